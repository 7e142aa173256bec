"""Whether two adapters on disk are the same: ΔW layer by layer, and their outputs in stock PEFT."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.adapters.cut import distance
from rankwise.adapters.layers import StoredAdapter
from rankwise.errors import InputError

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""The largest relative error of ΔW by the type of its numbers: B is rounded once more."""
SCRIPT = """
import json, sys
sys.modules["rankwise"] = None  # any import of it fails
import torch, transformers
from peft import PeftConfig, PeftModel
given = json.loads(sys.argv[1])
config = PeftConfig.from_pretrained(given["adapters"][0])
kinds = {"SEQ_CLS": "SequenceClassification", "CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM",
         "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
kind = getattr(transformers, "AutoModel" + ("For" + kinds[config.task_type] if config.task_type in kinds else ""))
outputs = []
for adapter in (None, *given["adapters"]):
    torch.manual_seed(0)
    model = kind.from_pretrained(config.base_model_name_or_path, dtype=torch.float32, **given["options"])
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    sizes = model.config
    draw, tokens = torch.Generator().manual_seed(0), getattr(sizes.get_text_config(), "vocab_size", None)
    if tokens:
        inputs = {"input_ids": torch.randint(0, tokens, (2, 12), generator=draw)}
    else:
        shape = (2, sizes.num_channels, sizes.image_size, sizes.image_size)
        inputs = {"pixel_values": torch.randn(shape, generator=draw)}
    if sizes.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        out = model.eval()(**inputs)
    outputs.append(next(value for name, value in out.items() if isinstance(value, torch.Tensor)))
base, one, other = outputs
print(json.dumps([float((one - other).abs().max()), float((one - base).abs().max())]))
"""


@dataclass(frozen=True)
class Verified:
    """How much a written adapter differs from another one.

    Attributes:
        layers: ‖ΔW − ΔW'‖ / ‖ΔW‖ by layer.
        logits: the largest difference between their outputs, and that between the outputs with and without the
            adapter; None where they could not be computed.
        why: the reason for that.
    """

    layers: dict[str, float]
    logits: tuple[float, float] | None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"layers": self.layers, "logits": self.logits, "why": self.why}

    def lines(self) -> list[str]:
        found = [f"verified: ΔW of {len(self.layers)} layers differs by at most {max(self.layers.values()):.1e}"]
        if self.logits:
            found.append(
                f"verified: in PEFT the outputs differ by at most {self.logits[0]:.1e}; the adapter changes them by "
                f"{self.logits[1]:.1e}"
            )
        return found if not self.why else [*found, f"outputs were not compared: {self.why}"]


def verified(one: StoredAdapter, other: StoredAdapter, logits: bool = True) -> Verified:
    """Compare two adapters, of which `other` may have more layers, if they are 0, and another prefix before names.

    Args:
        logits: compare the outputs too, in PEFT without rankwise, on the base model that the configuration names.

    Raises:
        InputError: they are not the same.
    """
    prefixed = one.config is not None and other.config is None  # by diffusers' name of the model
    names = {name.partition(".")[2] if prefixed else name: name for name in other.layers}
    errors = {}
    for name in one.names:
        if name not in names:
            raise InputError(f"{other.path}: does not adapt {name}, which {one.path} does")
        a, b = one.factors(name), other.factors(names[name])
        errors[name] = distance(a, b) / (distance(a, None) or 1)
        if not errors[name] <= ROUNDING.get(other.tensors.dtype[other.layers[names[name]].parts["B"]], 2**-3):
            raise InputError(f"{other.path}: ΔW of {name} differs by {errors[name]:.1e} of itself from {one.path}")
    for name in names.keys() - one.layers.keys():
        if other.factors(names[name]).B.any():
            raise InputError(f"{other.path}: adapts {name}, which {one.path} does not")
    if not logits or one.config is None:
        return Verified(errors, None)
    given = {"adapters": [str(each.path.resolve()) for each in (one, other)], "options": _options(one)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(given)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Verified(errors, None, last[:300])
    difference, effect = json.loads(done.stdout.strip().splitlines()[-1])
    if difference > max(1e-4, 0.01 * effect):
        raise InputError(f"{other.path}: in PEFT its outputs differ by {difference:.1e} from those of {one.path}")
    return Verified(errors, (difference, effect))


def _options(adapter: StoredAdapter) -> dict[str, int]:
    """The number of classes, from the head in the adapter's file; the base model alone may have another one."""
    ends = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classifier.modules_to_save.weight")
    heads = [adapter.tensors.shape[key][0] for key in adapter.others if key.endswith(ends)]
    return {"num_labels": heads[0]} if heads and str((adapter.config or {}).get("task_type")).endswith("CLS") else {}
