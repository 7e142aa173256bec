"""What becomes of each key of another trainer's file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import InputError
from rankwise.files import write_new
from rankwise.settings import RunConfig
from rankwise.settings.yaml_files import in_line, quoted

NOTHING = "rankwise has nothing like it"


@dataclass
class Carried:
    """A file of another trainer, and the settings of ours that it becomes.

    A key is read by `take`, after which `put` has it in a setting, or `lose` says why not; `mean_nothing` is for keys
    that only say how the other trainer works. `finish` gives a reason to each key that nobody has taken.

    Attributes:
        source: whose file it is.
        file, content: where it was read, and what it holds.
        settings: dotted setting -> value.
        sources: dotted setting -> a comment, mostly the keys that it comes from.
        lost: key -> why it is not carried over, or what is nearest to it.
        meaningless: keys that mean nothing here.
    """

    source: str
    file: Path
    content: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    meaningless: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)

    def given(self, key: str) -> bool:
        """Whether the file sets a key to anything."""
        return self.content.get(key) not in (None, "", [], {})

    def take(self, key: str, usual: Any = None) -> Any:
        """The value of a key, `usual` where the file has none; it counts as carried over unless `lose` is called."""
        if key in self.content:
            self.taken.append(key)
        return self.content[key] if self.given(key) else usual

    def number(self, key: str, usual: float | None = None) -> Any:
        """The same for a number, which may be in quotes. InputError for anything else."""
        value = self.take(key, usual)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                pass
            else:
                value = int(value) if value.is_integer() and "." not in self.content[key] else value
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise InputError(f"{self.file}: {key} = {quoted(value)}: expected a number")
        return value

    def put(self, setting: str, value: Any, comment: str) -> None:
        """Set one of our settings."""
        self.settings[setting] = value
        self.sources[setting] = comment

    def move(self, key: str, setting: str) -> None:
        """Carry a key over as it is."""
        if (value := self.take(key)) is not None:
            self.put(setting, value, key)

    def lose(self, key: str, reason: str) -> None:
        """Say why a key is not carried over, or what takes its place. Nothing where the file does not set it."""
        self.take(key)
        if self.given(key):
            self.lost[key] = reason

    def mean_nothing(self, *keys: str) -> None:
        """Keys that only say how the other trainer works. One that ends in `*` stands for all that begin so."""
        patterns = [re.escape(key).replace(r"\*", ".*") for key in keys]
        for key in self.content:
            if key not in self.taken and any(re.fullmatch(pattern, key) for pattern in patterns):
                self.taken.append(key)
                self.meaningless.append(key)

    def finish(self) -> None:
        """Give a reason to each key that is left: it is not set, or we have nothing like it."""
        for key, value in self.content.items():
            if key in self.lost or key in self.meaningless:
                continue
            if not self.given(key) or (key not in self.taken and value is False):
                self.meaningless.append(key)
            elif key not in self.taken:
                self.lost[key] = NOTHING

    # What all trainers have, under different names.

    def batch(self, micro: int, steps: int, keys: str) -> None:
        """Rows at once, and how many times that before a step."""
        self.put("batch_size", micro * steps, f"{keys}; over all GPUs together, not on each")
        if steps > 1:
            self.put("micro_batch", micro, keys.partition(" ")[0])

    def rank(self, rank: int, alpha: float, by_root: bool, keys: str) -> None:
        """Rank and scale; with `by_root` the product is scaled by α / √r, which is another α here."""
        self.put("method.rank", rank, keys)
        if by_root:
            self.put("method.alpha", alpha * math.sqrt(rank), "so that alpha / rank is their alpha / √rank (rslora)")
        else:
            self.put("method.alpha", alpha, "")

    def schedule(self, key: str, usual: str) -> str:
        """The course of the learning rate."""
        name = str(self.take(key, usual))
        known = {"constant_with_warmup": "constant"}.get(name, name)
        if known not in ("linear", "cosine", "constant"):
            self.lose(key, f"{name} is not a schedule here; cosine is in its place")
            known = "cosine"
        self.put("schedule", known, key)
        return name

    def warmup(self, steps: float | None, ratio: float | None, usual: float, constant: bool) -> None:
        """Warm-up in steps or as a share; none with `constant`, which has none there."""
        if constant:
            for key in ("warmup_steps", "warmup_ratio"):
                self.lose(key, "a constant rate has no warm-up there, so it has none here")
            self.put("warmup", 0, "a constant rate has no warm-up there")
        elif steps is not None:
            if steps == 1:  # to us all of them
                self.lose("warmup_steps", "a single step of warm-up cannot be given; it is left out")
            self.put("warmup", 0 if steps == 1 else steps, "warmup_steps")
            self.lose("warmup_ratio", "warmup_steps is given, and wins there too")
        else:
            self.put("warmup", usual if ratio is None else ratio, "" if ratio is None else "warmup_ratio")

    def optimizer(self, key: str) -> None:
        """Ours is AdamW, in fp32; with its weight decay, and the clipping and the seed of a run."""
        name = str(self.take(key, "adamw_torch"))
        if name not in ("adamw_torch", "adamw_torch_fused", "adamw_hf"):
            self.lose(key, f"AdamW in fp32 is in the place of {name}")
        for number, setting in (("weight_decay", "weight_decay"), ("max_grad_norm", "clip"), ("seed", "seed")):
            if (value := self.number(number)) is not None:
                self.put(setting, value if number == "seed" else float(value), number)

    def trainer(self, epsilon: float | None = None) -> None:
        """Numbers that TrainingArguments have under the same name; `epsilon` where the file has none."""
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"):
            if (value := self.number(key, epsilon if key == "adam_epsilon" else None)) is None:
                continue
            if key == "neftune_noise_alpha" and "packing" in self.settings:
                self.lose(key, "its noise depends on the length of a sequence, which packing changes")
            else:
                self.put(f"trainer.{key}", float(value), key)

    def precision(self, bf16: bool, fp16: bool, keys: str, whole: bool) -> None:
        """Frozen weights in 16 bits; a method that trains them keeps them in fp32 and only computes in 16."""
        if bf16 or fp16:
            self.put("autocast" if whole else "dtype", "bf16" if bf16 else "fp16", keys)

    def quantised(self, bits: int, keys: str, whole: bool) -> None:
        """A base in 8 or 4 bits."""
        name = str(self.settings.get("model", ""))
        if whole or re.search(r"-(bnb|nf4|awq|gptq|fp8)\b", name.lower()):
            why = "only a frozen base can be quantised, and all weights train"
            for key in keys.split(", "):
                self.lose(key, why if whole else f"{name} is quantised already, by its name, so quantise is left out")
        else:
            self.put("quantise", f"{bits}bit", keys)

    def compiled(self) -> None:
        """`torch_compile`, except on a quantised base."""
        if self.take("torch_compile") and "quantise" in self.settings:
            self.lose("torch_compile", "a run on a quantised base is not compiled")
        elif self.content.get("torch_compile"):
            self.put("compile", True, "torch_compile")

    def lean(self, *keys: str) -> None:
        """Keys by which a step keeps fewer activations or logits, except in a compiled run and in fp16."""
        asked = [key for key in keys if self.take(key)]
        if self.settings.get("compile") or "fp16" in (self.settings.get("dtype"), self.settings.get("autocast")):
            for key in asked:
                self.lose(key, "activation_memory: lean, which comes closest, is not for compiled runs and fp16")
        elif asked:
            self.put("activation_memory", "lean", ", ".join(asked))

    def targets(self, value: Any, key: str) -> None:
        """The modules that are adapted: names, or all linear layers."""
        if value in ("all", "all-linear"):
            self.put("method.targets", "all-linear", key)
        elif isinstance(value, list):
            self.put("method.targets", sorted(set(map(str, value))), key)
        else:
            self.lose(key, "a regular expression; all linear layers are in its place: name modules at method.targets")

    def attention(self, name: str, key: str) -> None:
        known = {"fa2": "flash_attention_2", "disabled": "eager", "flash_attention": "flash_attention_2"}.get(
            name, name
        )
        if known in ("auto", "sdpa", "eager", "flash_attention_2"):
            self.put("attention", known, key)
        else:
            self.lose(key, f"{name} is not known here; attention: auto is in its place")

    def held_out(self, key: str) -> None:
        """Rows to score."""
        share = self.number(key, 0)
        self.lost[key] = f"{share or 'none'} there; a tenth of a single file is scored, or its validation split"

    def write(self, file: Path) -> None:
        """Write the file. Raises InputError if there is one already, or none can be."""
        write_new(file, self.text(file), "-o FILE")

    def text(self, file: Path) -> str:
        """The content of our file."""
        lines = [
            f"# From {self.source}: {_line(self.file.name)}. Check it, look at the data, then train:",
            *(f"#   rankwise {command} {_line(str(file))}" for command in ("validate", "data", "train")),
        ]
        if self.lost:
            lines += [
                "#",
                "# Not carried over:",
                *(f"#   {_line(key)}: {_line(why)}" for key, why in self.lost.items()),
            ]
        lines.append("")
        order = {key: place for place, key in enumerate(RunConfig.model_fields)}
        below = ""
        for key in sorted(self.settings, key=lambda key: order[key.partition(".")[0]]):
            head, dot, rest = key.partition(".")
            if dot and head != below:
                lines.append(f"{head}:")
            below = head if dot else ""
            comment = f"  # {_line(self.sources[key])}" if self.sources[key] else ""
            lines.append(f"{'  ' if dot else ''}{rest or head}: {in_line(self.settings[key])}{comment}")
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """What became of each key, for people."""
        found = self.as_json()
        lines = [f"{self.source}: {self.file.name}", "", f"carried over: {', '.join(found['carried'])}"]
        if self.lost:
            lines += ["", "not carried over:", *(f"  {key}: {why}" for key, why in self.lost.items())]
        if self.meaningless:
            lines += ["", f"without meaning here, or not set: {', '.join(self.meaningless)}"]
        return "\n".join(map(_line, lines))

    def as_json(self) -> dict[str, Any]:
        """What became of each key."""
        keys = [key for key in self.content if key not in self.lost and key not in self.meaningless]
        return {"carried": keys, "not_carried": self.lost, "meaningless": self.meaningless, "settings": self.settings}


def _line(text: Any) -> str:
    """`text` in one line of a comment."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))
