"""An adapter merged into its base model: a plain model for transformers, and where wanted a GGUF file of it."""

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from shutil import which
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer

from rankwise.adapters import load
from rankwise.adapters.peft_folder import PREFIX
from rankwise.adapters.save import DESCRIPTION, REPEATABLE
from rankwise.commands.base import load_base, source_of
from rankwise.errors import InputError, require
from rankwise.files import ADAPTER, check_files, read_json, replace_folder, unfinished
from rankwise.ranks.kept import RESIDUAL
from rankwise.runs import use
from rankwise.train.arguments import DTYPES
from rankwise.train.model import quiet

CONFIG, WEIGHTS = ADAPTER[0], ADAPTER[2]
CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
MOST_ERROR = 1e-3
"""Of the largest logit: more than rounding changes, where the saved model is loaded again."""


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        folder: where it is.
        kind: its class.
        layers: how many weights were changed by the adapter.
        dtype: of the saved weights.
        rounding: ‖rounded - exact‖ / ‖exact - base‖ over these weights, from saving them in `dtype`.
        untied: whether the output layer no longer shares its weights with the embedding.
        files: names of the weight files.
        gguf: the GGUF file.
        assumed: what is not known of the weights that the adapter was trained on, and what to give; "" if all is.
    """

    folder: Path
    kind: str
    layers: int
    dtype: str
    rounding: float
    untied: bool
    files: tuple[str, ...]
    gguf: Path | None
    assumed: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "gguf": self.gguf and str(self.gguf)}

    def text(self) -> str:
        lines = [f"{self.folder}: {self.kind} in {self.dtype}, {self.layers} layer{'s' * (self.layers != 1)} changed"]
        if self.rounding:
            lines.append(f"rounding to {self.dtype} changed them by {self.rounding:.2g} of what the adapter changes")
        if self.untied:
            lines.append("output layer and embedding no longer share their weights: the adapter changed one of them")
        lines += [f"{self.gguf}: the same for llama.cpp"] if self.gguf else []
        return "\n".join([*lines, *([self.assumed] if self.assumed else [])])


def merge(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    base: str | None = None,
    dtype: str | None = None,
    quantise: str | None = None,
    max_shard_size: str = "5GB",
    gguf: bool = False,
    force: bool = False,
) -> Merged:
    """Merge an adapter into its base model and write that with its tokenizer, completely or not at all.

    W + s B A is computed in fp32, one layer at a time, and rounded once. A start that was subtracted from W (PiSSA,
    OLoRA) is subtracted again first, as PEFT does. Trained heads, embeddings and statistics take the place of those of
    the base. If only one of two modules with shared weights was changed, they are separate afterwards.

    Args:
        adapter: the folder of a PEFT adapter, of what `rankwise.save` wrote, or of a run.
        base: a folder, a name on the hub or a GGUF file; else what the adapter says.
        dtype: of the saved weights, `fp32`, `bf16` or `fp16`; else that of the base.
        quantise: `4bit` or `8bit` if the adapter was trained on a base in 4 or 8 bits, which is then de-quantised for
            merging, else `none`; adapters of runs know it, and for others the result says what was assumed. A base that
            is saved quantised is always de-quantised.
        max_shard_size: of a weight file, such as `5GB`.
        gguf: also convert it with llama.cpp's converter.
        force: replace a model that is there.

    Raises:
        InputError: the adapter does not fit the base, or is of a kind that no weight of the base can hold, a number is
            too large for fp16, there is no converter, or something is at `out`.
    """
    folder, out = _adapter(Path(adapter)), Path(out)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    known = use.read(folder)
    named = config.get("base_model_name_or_path") or (known.settings.get("model") if known else None)
    source = source_of(folder, base or named)
    _check_free(out, force, folder, source)
    converter = _converter() if gguf else None
    _check_kind(folder, config)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied and quantised weights, which are taken care of
        base_model = load_base(folder, config, source, dtype, quantise, known)
        dtype, names = base_model.dtype, {*base_model.model.state_dict()}
        # A start is subtracted from them in new tensors, so that these are kept; others are merged a layer at a time.
        before = {name: p.data for name, p in base_model.model.named_parameters()} if base_model.start else {}
        model: Any = load(base_model.model, folder).eval()
        untied, layers, rounding = False, 0, 0.0
        if isinstance(model, PeftModel):
            untied = _separate(model)
            layers, rounding = _merge_layers(model, DTYPES[dtype], before)
            model = _unloaded(model)
        if strange := {*model.state_dict()} - names:
            raise InputError(f"{folder}: adds {min(strange)} to the model, which transformers would not load")
        untied |= _untied(model)
        for name, parameter in model.named_parameters():  # no buffers: rotary frequencies stay fp32
            if base_model.cast:
                parameter.data = parameter.data.to(DTYPES[dtype])
            if dtype == "fp16" and not torch.isfinite(parameter).all():
                raise InputError(f"{name}: has numbers above 65504, the largest in fp16: give --dtype bf16 or fp32")
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(out, folder=True) as temporary:
            new = temporary / "model"
            model.save_pretrained(new, max_shard_size=max_shard_size)
            if untied:
                _check_untied(model, new)
            _copy_processor(folder, source, new)
            file = _to_gguf(converter, new, dtype) if converter else None
            files = tuple(sorted(path.name for path in new.glob("*.safetensors")))
            replace_folder(out, new)
    return Merged(
        *(out, type(model).__name__, layers, dtype, rounding, untied, files),
        gguf=out / file if file else None,
        assumed=base_model.assumed,
    )


def _adapter(path: Path) -> Path:
    """The folder of an adapter, which may be that of a run."""
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in (CONFIG, DESCRIPTION)):
            return check_files(folder)
    require(not path.is_file(), f"{path}: is a file; give the folder of a PEFT adapter")
    raise InputError(f"{path}: holds no adapter: it has neither {CONFIG} nor {DESCRIPTION}")


def _check_free(out: Path, force: bool, folder: Path, source: str) -> None:
    """Raise InputError unless `out` is new or empty, or holds a model and `force` is given."""
    for kept in (folder, Path(source)):
        if kept.exists() and (out.resolve() == kept.resolve() or out.resolve() in kept.resolve().parents):
            raise InputError(f"{out}: holds {kept.name}, which is to be merged; give another name")
    require(out.is_dir() or not out.exists(), f"{out}: is a file; give another name")
    if out.is_dir() and any(out.iterdir()):
        require(force, f"{out}: is there already; give another name, or --force to replace it")
        own = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
        require(own, f"{out}: holds something other than a model, which would be lost; give another name")


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError for adapters that no weight of the base model can hold, and starts that cannot be repeated."""
    if config.get("is_prompt_learning") or str(config.get("peft_type")).endswith(("TUNING", "PROMPT")):
        raise InputError(f"{folder}: {config['peft_type']} adds virtual tokens, which are no weights of the base model")
    if config.get("alora_invocation_tokens"):
        raise InputError(f"{folder}: aLoRA changes only what follows its invocation tokens, so it cannot be merged")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(RESIDUAL) and start not in REPEATABLE:
        raise InputError(
            f"{folder}: its start, {start}, has changed the base weights and cannot be repeated: save it with PEFT's "
            "path_initial_model_for_weight_conversion, and merge that"
        )


@torch.no_grad()
def _separate(model: PeftModel) -> bool:
    """Give each adapted layer a weight of its own; whether any was shared."""
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = False
    for _, layer in _tuned(model):
        module = layer.get_base_layer()
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and holders.get(id(weight), 0) > 1:
            holders[id(weight)] -= 1
            module.weight = nn.Parameter(weight.clone(), requires_grad=False)
            found = True
    return found


def _tuned(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def _merge_layers(model: PeftModel, dtype: torch.dtype, original: dict[str, Tensor]) -> tuple[int, float]:
    """Merge layer by layer in fp32, and round to `dtype`; how many, and the error of rounding (`Merged.rounding`).

    `original` has the base weights, by their names in the base model, from which the adapter subtracts a start.
    """
    count, error, added = 0, 0.0, 0.0
    for place, layer in _tuned(model):
        if not any(name in part for name in layer.active_adapters for part in _parts(layer)):
            continue
        base: Any = layer.get_base_layer()
        layer.float()
        before = {
            name: original.pop(f"{place.removeprefix(PREFIX)}.{name}", p.detach()).clone()
            for name, p in base.named_parameters(recurse=False)
        }
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError, RuntimeError) as reason:
            # In this order, of PEFT 0.21: grouped convolutions; infinite numbers; `lora_bias` without a bias.
            name = place.removeprefix(PREFIX)
            raise InputError(f"PEFT cannot merge {name}: {' '.join(str(reason).split())}") from reason
        base = layer.get_base_layer()
        count += 1
        for name, after in base.named_parameters(recurse=False):
            change = _square(after - before[name])
            added += change
            error += _square(after.to(dtype).float() - after) if change else 0.0
        base.to(dtype)
    return count, math.sqrt(error / added) if added else 0.0


def _parts(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name)]


def _square(values: Tensor) -> float:
    return values.double().square().sum().item()


def _unloaded(model: PeftModel) -> Any:
    """The base model without PEFT's layers, whose weights have been merged."""
    try:
        plain = model.base_model.unload()  # type: ignore[operator]
    except AttributeError as reason:  # of PEFT 0.21 beside a head of several layers, where it looks for one weight
        kind = model.peft_config[model.active_adapter].peft_type
        raise InputError(f"PEFT cannot take its {kind} layers out of this model: {reason}") from reason
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(True)
        assert ".base_layer." not in name, name
    return plain


def _untied(model: Any) -> bool:
    """Whether embedding and output layer, tied in the configuration, have other weights now; it is then corrected."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return False
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(table, "weight", None) for table in tables)
    if first is None or last is None or first is last:
        return False
    if first.shape == last.shape and torch.equal(first, last):
        model.tie_weights()
        return False
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    return True


@torch.no_grad()
def _check_untied(model: Any, folder: Path) -> None:
    """Raise InputError where transformers ties the weights of the saved model again, or computes otherwise without."""
    again = type(model).from_pretrained(folder, dtype=model.dtype).eval()
    inputs = {
        name: value % model.config.get_text_config().vocab_size
        for name, value in model.dummy_inputs.items()
        if name in inspect.signature(model.forward).parameters and value.dtype == torch.long
    }
    expected, found = model.eval()(**inputs)[0], again(**inputs)[0]
    if (found - expected).abs().max() > MOST_ERROR * expected.abs().max():
        raise InputError(
            f"the adapter changes one of two modules with shared weights, which {type(model).__name__} cannot keep "
            "apart: leave the output layer and the embedding out of targets"
        )


def _copy_processor(folder: Path, source: str, out: Path) -> None:
    """Copy the tokenizer, or what else prepares inputs: the adapter's, else that of the base. Some have none."""
    for kind, place in ((AutoTokenizer, str(folder)), (AutoProcessor, source), (AutoTokenizer, source)):
        if place == str(folder) and not (folder / "tokenizer_config.json").is_file():
            continue
        with suppress(OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
            kind.from_pretrained(place).save_pretrained(out)
            return


def _converter() -> Path:
    """llama.cpp's converter: in the folder LLAMA_CPP, on the path, or where `make clients` has put it."""
    places = [Path(os.environ["LLAMA_CPP"]) / CONVERTER] if os.environ.get("LLAMA_CPP") else []
    places += [Path(found)] if (found := which(CONVERTER)) else []
    places += sorted(Path(".venv-clients").glob(f"source/*/vendor/llama.cpp/{CONVERTER}"))
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"--gguf: llama.cpp's {CONVERTER} is not there: set LLAMA_CPP to the folder of its source, or run make clients "
        "in a clone of rankwise"
    )


def _to_gguf(converter: Path, folder: Path, dtype: str) -> str:
    """Convert the saved model; the name of the file, which is put next to it."""
    name = f"model-{GGUF_TYPES[dtype]}.gguf"
    options: Sequence[str] = ("--outfile", str(folder / name), "--outtype", GGUF_TYPES[dtype])
    done = subprocess.run([sys.executable, str(converter), str(folder), *options], capture_output=True, text=True)
    if done.returncode or not (folder / name).is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"--gguf: {converter} cannot convert {json.dumps(folder.name)}: {reason[:300]}")
    return name
