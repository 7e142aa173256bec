"""What to type so that another trainer takes ranks by layer; where it cannot take them, that it cannot.

As read in the trainers' own code: axolotl hands `lora_rank_pattern` and `lora_alpha_pattern` to PEFT (since May 2026;
versions before drop unknown keys without a word) and takes whole alphas only. Unsloth's `get_peft_model` hands all that
PEFT's LoraConfig knows to PEFT. LLaMA-Factory makes its LoraConfig of one `lora_rank`; a rank pattern in its file would
be ignored, but an adapter that it trains on from keeps its ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

TAKEN = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "fan_in_fan_out": "lora_fan_in_fan_out",
}
"""PEFT's options -> axolotl's keys."""
AXOLOTL = ".axolotl.yaml"
"""End of the name of the file with axolotl's keys."""


def snippets(config: Mapping[str, Any], parameters: int, out: Path) -> dict[str, str]:
    """What to type, by trainer, for the options of a LoraConfig that are in the file or adapter folder `out`.

    `parameters` is what then trains.
    """
    writes, folder = config.get("task_type") == "CAUSAL_LM", out.suffix != ".json"
    if not writes:
        others = {"axolotl, LLaMA-Factory, Unsloth": "train models that write text; this one does not"}
        return {"PEFT, TRL": _from_folder(out) if folder else _from_file(out, parameters), **others}
    if folder:
        return {
            "PEFT, TRL": _from_folder(out),
            "axolotl": f"adapter: lora\nlora_model_dir: {out}",
            "LLaMA-Factory": f"finetuning_type: lora\nadapter_name_or_path: {out}\ncreate_new_adapter: false",
            "Unsloth": f"model, tokenizer = FastLanguageModel.from_pretrained({str(out)!r})",
        }
    other = f"give -o {out.with_suffix('')}, a folder, for an untrained adapter"
    return {
        "PEFT, TRL": _from_file(out, parameters),
        "axolotl": (
            f"add the keys in {out.with_suffix(AXOLOTL)}, and leave lora_target_linear out"
            if axolotl(config, parameters)
            else f"takes whole alphas only: make alpha / rank of the method a whole number, or {other}"
        ),
        "LLaMA-Factory": (
            "has one lora_rank for all layers and would ignore others, but keeps the ranks of an adapter to train on "
            f"from: {other}"
        ),
        "Unsloth": (
            _unsloth(config, out, parameters)
            if isinstance(config["target_modules"], list)
            else f"takes no expression for target_modules: {other}"
        ),
    }


def axolotl(config: Mapping[str, Any], parameters: int) -> str:
    """The keys of an axolotl file; "" for what it cannot take: fractional alphas, and models that do not write text."""
    alphas = [config["lora_alpha"], *config["alpha_pattern"].values()]
    if config.get("task_type") != "CAUSAL_LM" or not all(isinstance(alpha, int) for alpha in alphas):
        return ""
    keys = {"adapter": "lora", **{key: config[own] for own, key in TAKEN.items() if config.get(own)}}
    return (
        f"# {parameters:,} parameters train, as axolotl says at its start. If it says another number, it is older\n"
        "# than lora_rank_pattern (May 2026) and has dropped it.\n"
        f"{yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=10_000)}"
    )


def _from_file(out: Path, parameters: int) -> str:
    return f"""import json
from pathlib import Path
from peft import LoraConfig, get_peft_model

config = LoraConfig(**json.loads(Path({str(out)!r}).read_text()))  # for TRL: peft_config=config
model = get_peft_model(model, config)  # adds {parameters:,} parameters"""


def _from_folder(out: Path) -> str:
    return f"""from peft import PeftModel

model = PeftModel.from_pretrained(model, {str(out)!r}, is_trainable=True)"""


def _unsloth(config: Mapping[str, Any], out: Path, parameters: int) -> str:
    names = tuple(name for name in TAKEN if name in config and name != "fan_in_fan_out")
    return f"""import json
from pathlib import Path
from unsloth import FastLanguageModel

config = json.loads(Path({str(out)!r}).read_text())
options = {{name: config[name] for name in {names}}}
model = FastLanguageModel.get_peft_model(model, **options)  # adds {parameters:,} parameters"""
