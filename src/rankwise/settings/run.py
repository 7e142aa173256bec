"""The settings of one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankwise.errors import InputError, nearest
from rankwise.named import FARTHEST, LARGEST, asked
from rankwise.settings.yaml_files import quoted

FORMAT = 2
"""Number of the format of ids. They leave out what has its default, so it rises when any default changes its value."""
SCALED = {"smoke": "{model: random-gpt2}", "small": "{model: smollm2, train_rows: 1000}"}
"""The scales that a file may have a section for, each with an example."""
# What an experiment has beside the settings of its runs.
SECTIONS = ("vary", "chain", "tune", "report", *SCALED, "published")
# What rankwise itself writes into a run.yaml, beside the settings.
WRITTEN = ("id", "format", "kind", "made_with", "begun_with", "digest")
# Settings that say where files are and who is told; runs do not differ in them.
PLACE = ("runs", "plugins", "report_to")
# What is named and may have options below its name, each with an example.
NAMED = {"method": "lora", "task": "mrpc"}
DECODER = "smollm2"
"""The model of a task that generates text and names none."""
# What `scale: smoke` allows at most: enough to go through every stage of a run, too little to learn anything.
SMOKE = {"train_rows": 64, "eval_rows": 64, "max_steps": 4}


Kind = Literal["run", "trial", "stage"]
"""A run that is reported on its own, one that tries a learning rate, or a stage of a chain."""


class RunConfig(BaseModel):
    """The settings of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    task: dict[str, Any] = Field(
        description="name of the task and its options; or `type`, `dataset` and `columns` for data of your own"
    )
    model: str | None = Field(
        default=None,
        description="folder, GGUF file or hub name of the base model, or random-gpt2, random-t5, random-llama, "
        "random-bert or random-deberta (small, untrained); when absent the embedded MiniLM, the embedded smollm2 for "
        "tasks that write text, the U-Net for segmentation",
    )
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "lora"}, description="name of the method and its options"
    )
    trust_remote_code: bool = Field(
        default=False, description="run the code that comes with the model; only for models whose code you have read"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="number format of the frozen weights; what trains is fp32 in any case"
    )
    autocast: Literal["none", "bf16", "fp16"] | None = Field(
        default=None, description="number format that layers compute in; that of dtype when absent, none is fp32"
    )
    quantise: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="codes that frozen linear layers are held in, by bitsandbytes; 4bit is QLoRA's nf4"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto", description="how attention is computed; auto leaves it to transformers"
    )
    compile: bool = Field(
        default=False, description="compile the training step by torch.compile; evaluations are not compiled"
    )
    fast: bool = Field(
        default=True,
        description="compute each LoRA layer by one function: less time, the same results except for the order of sums",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass instead of keeping them"
    )
    activation_memory: Literal["plain", "lean"] = Field(
        default="plain",
        description="lean: compute outputs of norms and activations again in the backward pass, and few logits at once",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="rows at once in each process; all rows of a step when absent; halved when memory runs out",
    )
    packing: bool = Field(
        default=False, description="several rows of a step in one sequence of max_length tokens, read apart"
    )
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="other fields of transformers.TrainingArguments, such as adam_beta2"
    )
    epochs: float = Field(
        default=3.0, gt=0, le=1e6, description="passes over the training rows; max_steps, when given, wins"
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=LARGEST, description="optimizer steps of the whole run, instead of epochs"
    )
    batch_size: int = Field(default=32, ge=1, le=LARGEST, description="rows in one optimizer step")
    learning_rate: float = Field(default=1e-3, gt=0, le=FARTHEST, description="highest learning rate of the schedule")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the fresh weights and of the order of the rows")
    max_length: int = Field(default=128, ge=4, le=LARGEST, description="longest input in tokens; longer texts are cut")
    train_rows: int | None = Field(
        default=None, ge=1, le=LARGEST, description="rows to train on, drawn once and the same for every seed"
    )
    eval_rows: int | None = Field(
        default=None, ge=1, le=LARGEST, description="rows to score, drawn once and the same for every seed"
    )
    warmup: float = Field(
        default=0.06, ge=0, le=LARGEST, description="share of the steps (up to 1), or a whole number of steps above 1"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="course of the rate after warm-up"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, le=FARTHEST, description="AdamW's weight decay of the trained matrices"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each label that is spread evenly over all classes or tokens"
    )
    clip: float = Field(default=1.0, ge=0, le=FARTHEST, description="largest norm of the gradient; 0 does not clip")
    budget: int | None = Field(
        default=None,
        ge=1,
        le=10**15,
        description="trainable parameters at most, without the head; chooses the size (rank, …) that is not given",
    )
    eval_every: int | None = Field(
        default=None,
        ge=0,
        le=LARGEST,
        description="steps between evaluations; once an epoch when absent, 0 at the end alone",
    )
    checkpoint_every: int | None = Field(
        default=None, ge=1, le=LARGEST, description="steps between checkpoints; once an epoch when absent"
    )
    tuning: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1, le=LARGEST)] | None = Field(
        default=None,
        description="share of the training rows held out, or number of other rows, scored in place of those to "
        "evaluate on; `tune:` sets it",
    )
    scale: Literal["smoke", "small", "full"] = Field(
        default="full",
        description="smoke: a few rows and steps, to try the whole way; small: as the file's section `small` says",
    )
    runs: str = Field(default="runs", min_length=1, description="folder in which the folder of the run is made")
    plugins: list[str] = Field(
        default_factory=list, description="Python files with methods, tasks or metrics of your own; their code is run"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list, description="what gets losses, scores, ranks and their picture while the run trains"
    )
    tuned: bool = Field(default=False, description="whether `tune:` has chosen the learning rate; `tune:` sets it")
    after: str | None = Field(
        default=None, description="id of the run whose trained weights this one begins with; `chain:` sets it"
    )
    followed: bool = Field(
        default=False, description="keep all that was trained, for a run that begins with it; `chain:` sets it"
    )

    @property
    def id(self) -> str:
        """12 hex digits that name a run by what is asked, which is what differs from the defaults.

        So a setting or an option that is added later, with a default, leaves the ids of all older runs as they are.
        Where a run is stored, where its plugins are, whom it reports to, what makes it, and whether `tune:` has chosen
        its rate are not in its id.
        """
        settings = self.model_dump(mode="json", exclude={*PLACE, "tuned", *NAMED}, exclude_defaults=True)
        settings |= {key: asked(key, getattr(self, key)) for key in NAMED}
        return hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def kind(self) -> Kind:
        """What the run is for, as its `run.yaml` then says."""
        return "trial" if self.tuning is not None else "stage" if self.after is not None or self.followed else "run"

    @property
    def fast_layers(self) -> bool:
        """Whether LoRA layers are computed by one function. In a compiled step they are PEFT's."""
        return self.fast and not self.compile

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        """`method: lora` means `method: {name: lora}`, and `scale: smoke` caps rows and steps."""
        if not isinstance(data, Mapping):
            return data
        data = {key: named(key, value) if key in NAMED else value for key, value in data.items()}
        if data.get("scale") == "smoke":
            for key, most in SMOKE.items():
                value = data.get(key)
                if value is None or (isinstance(value, int) and value > most):
                    data[key] = most
            if isinstance(rows := data.get("tuning"), int):
                data["tuning"] = min(rows, SMOKE["eval_rows"])
        return data

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for key, value in (("method", self.method), ("task", self.task)):
            if not isinstance(value.get("name"), str):
                raise ValueError(f"{key}: needs a name, as in `{key}: {{name: {NAMED[key]}}}`")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup = {self.warmup}: expected a share up to 1 or a whole number of steps")
        if self.compile and self.quantise != "none":
            raise ValueError("compile: not for quantised weights; leave out compile or quantise")
        if self.activation_memory == "lean" and self.compile:
            raise ValueError("activation_memory: a compiled step decides what it keeps; leave out compile or lean")
        if self.activation_memory == "lean" and "fp16" in (self.dtype, self.autocast):
            raise ValueError(
                "activation_memory: lean computes gradients before fp16 scales the loss up; use bf16, or leave it out"
            )
        if self.dtype != "fp32" and self.autocast not in (None, self.dtype):
            raise ValueError(f"autocast = {self.autocast}: weights of dtype {self.dtype} compute in {self.dtype}")
        if self.packing and self.trainer.get("neftune_noise_alpha") is not None:
            raise ValueError(
                "trainer.neftune_noise_alpha: its noise is scaled by the length of a sequence, which packing changes; "
                "leave one of them out"
            )
        return self


def named(key: str, value: Any) -> dict[str, Any]:
    """What stands at `method` or `task` as a mapping: a name alone, or a mapping; a task's `type` is its name."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        example = NAMED[key]
        raise InputError(f"{key} = {quoted(value)}: expected a name or a mapping, as in `{key}: {{name: {example}}}`")
    if key == "task" and "type" in value and "name" not in value:
        return {"name" if option == "type" else option: each for option, each in value.items()}
    return dict(value)


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. The mapping below it is copied first: the combinations must not share it."""
    head, dot, rest = key.partition(".")
    if not dot:
        data[head] = value
    elif head in NAMED:
        part = named(head, data.get(head, {"name": "lora"} if head == "method" else {}))
        data[head] = with_nested(part, "name" if (head, rest) == ("task", "type") else rest, value)
    elif head == "vary":  # whose own keys are dotted
        below = data.get(head)
        data[head] = {**(below if isinstance(below, dict) else {}), rest: value}
    elif head in ("tune", "report", "trainer"):
        data[head] = with_nested(data.get(head), rest, value)
    else:
        raise InputError(f"{key}: only {', '.join(NAMED)}, trainer, vary, tune and report have keys below them")


def with_nested(data: Any, key: str, value: Any) -> dict[str, Any]:
    """A copy of `data`, {} where it is no mapping, with a dotted key set: `columns.label` is `label` of `columns`."""
    head, dot, rest = key.partition(".")
    below = dict(data) if isinstance(data, Mapping) else {}
    return {**below, head: with_nested(below.get(head), rest, value) if dot else value}


def flattened(data: Mapping[str, Any], joint: str = ".", above: str = "") -> dict[str, Any]:
    """Nested keys as one, joined by `joint`: {"method": {"rank": 4}} is {"method.rank": 4}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{above}{key}"
        flat |= flattened(value, joint, name + joint) if isinstance(value, Mapping) else {name: value}
    return flat


def run_config(data: Mapping[str, Any]) -> RunConfig:
    known = [*RunConfig.model_fields, *SECTIONS]
    for key in data:
        if key in SECTIONS:
            raise InputError(f"{key}: belongs to an experiment, a file with `vary:`; a run on its own has none")
        if key not in RunConfig.model_fields:
            raise InputError(f"{key}: there is no such key{nearest(key, known)}")
    if data.get("task") is None:
        raise InputError("task: is missing; `rankwise tasks` lists the names")
    try:
        # by way of JSON: strict about types, yet a list is fine where a tuple is wanted
        return RunConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise InputError(explain(error)) from None


def explain(error: ValidationError, key: str = "") -> str:
    """One line for the first key that is wrong; a union's alternatives are joined by `or`."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    place = key or ".".join(map(str, first["loc"][:1])) or "settings"
    expected = dict.fromkeys(
        item["msg"].removeprefix("Input should be ").removeprefix("a valid ").replace("array", "list")
        for item in error.errors()
        if key or item["loc"][:1] == first["loc"][:1]
    )
    # a text that reads as a number: a folder 2024, a run's id 12850e102075
    hint = ": put it in quotes" if "string" in expected and isinstance(first["input"], int | float) else ""
    return f"{place} = {quoted(first['input'])}: expected {' or '.join(expected)}{hint}"
