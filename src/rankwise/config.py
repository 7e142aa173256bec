"""What a user writes (YAML and key=value) turned into checked, frozen settings. No torch in here.

`load` is the one door: it reads a file, applies the overrides, checks every value against the schema of methods and
tasks that its caller hands in, and returns a `RunConfig` (one run) or an `Experiment` (a file with `vary:`).
Whatever is wrong comes back as one `InputError`, one line that says what is wrong and what would be right.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from rankwise.errors import InputError, nearest
from rankwise.files import read_bytes


@dataclasses.dataclass(frozen=True)
class Schema:
    """What may be named in a configuration: methods and tasks by name, frozen dataclasses whose fields are options."""

    methods: Mapping[str, type]
    tasks: Mapping[str, type]


LARGEST = 2**31 - 1  # of a whole number; no option counts more than that
FARTHEST = 1e38  # of any other number, on both sides of 0: what a float32 can hold
MOST_RUNS = 10_000  # of an experiment, and of what its tuning tries

# Of YAML. What means more than this is no configuration, and would take minutes to read.
LONGEST = 1_000_000  # characters
DEEPEST = 50  # lists and mappings within each other
MOST_VALUES = 50_000  # what aliases stand for counted as often as they do
LONGEST_NUMBER = 400  # characters; a float has no more

# What an experiment has beside the settings of its runs.
SECTIONS = ("vary", "chain", "tune", "report", "smoke", "published")

# What rankwise itself writes into a run.yaml, beside the settings.
WRITTEN = ("id", "made_with", "begun_with")

# What is named and may have options below its name, each with an example.
NAMED = {"method": "lora", "task": "mrpc"}

# What `scale: smoke` allows at most: enough to go through every stage of a run, too little to learn anything.
SMOKE = {"train_rows": 64, "eval_rows": 64, "max_steps": 4}

# Settings of a run that a section of an experiment makes, each with what to write in their place.
_BY_SECTION = {
    "tuning": "tune chooses learning rates, and tune.share says by what",
    "after": "the stages of `chain:` follow one another by themselves",
    "followed": "the stages of `chain:` follow one another by themselves",
}

# Settings of a run that an entry of these axes may bring along for itself.
OWN = {"method": ("learning_rate", "warmup"), "task": ("epochs",)}


class RunConfig(BaseModel):
    """The settings of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    task: dict[str, Any] = Field(
        description="name of the task and its options; or `type`, `dataset` and `columns` for data of your own"
    )
    model: str | None = Field(
        default=None,
        description="folder or hub name of the base model, or random-gpt2, random-t5, random-llama, "
        "random-bert or random-deberta (small, untrained); the embedded MiniLM when absent, the U-Net where masks are "
        "wanted",
    )
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "lora"}, description="name of the method and its options"
    )
    trust_remote_code: bool = Field(
        default=False, description="run the code that comes with the model; only for models whose code you have read"
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
    tuning: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the training rows held out and scored, in place of those to evaluate on; `tune:` sets it",
    )
    scale: Literal["smoke", "full"] = Field(
        default="full", description="smoke: a few rows and steps, to try the whole way"
    )
    runs: str = Field(default="runs", min_length=1, description="folder in which the folder of the run is made")
    after: str | None = Field(
        default=None, description="digest of the run whose trained weights this one begins with; `chain:` sets it"
    )
    followed: bool = Field(
        default=False, description="keep all that was trained, for a run that begins with it; `chain:` sets it"
    )

    def digest(self) -> str:
        """64 hex digits that name these settings, wherever the run is stored."""
        settings = self.model_dump(mode="json", exclude={"runs"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

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
        return data

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for key, value in (("method", self.method), ("task", self.task)):
            if not isinstance(value.get("name"), str):
                raise ValueError(f"{key}: needs a name, as in `{key}: {{name: {NAMED[key]}}}`")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup = {self.warmup}: expected a share up to 1 or a whole number of steps")
        return self


class Span(BaseModel):
    """All learning rates between two, equally likely on a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    low: float = Field(gt=0, le=FARTHEST)
    high: float = Field(gt=0, le=FARTHEST)

    @model_validator(mode="after")
    def _check(self) -> Span:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} must be below high = {self.high:g}")
        return self


Rates = tuple[float, ...] | Span


class Tune(BaseModel):
    """How the learning rate of each method is chosen, on rows that are not reported."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    learning_rate: Any = Field(
        default=None, description="rates to try, or {low, high}, between which Optuna chooses `trials` rates"
    )
    trials: int | None = Field(
        default=None, ge=1, le=MOST_RUNS, description="how many rates between low and high are tried"
    )
    at_once: int = Field(
        default=2, ge=1, le=MOST_RUNS, description="rates that Optuna gives before it hears what one of them is worth"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default_factory=lambda: [0], min_length=1, description="seeds at which rates are tried"
    )
    share: float = Field(
        default=0.1, gt=0, lt=1, description="share of the training rows to choose by, where a task has no other rows"
    )

    def rates(self, own: Any = None, key: str = "tune.learning_rate") -> Rates:
        """The rates to try: a method's `own`, else those for all, of which `key` is what the user calls them.

        Raises InputError for what means no rates.
        """
        value = self.learning_rate if own is None else own
        if value is None:
            raise InputError(f"{key}: is missing; give rates to try, as in [1e-4, 1e-3], or {{low: 1e-5, high: 1e-2}}")
        try:
            if isinstance(value, Mapping):
                if self.trials is None:
                    raise InputError("tune.trials: is missing; say how many rates between low and high to try")
                if strange := [each for each in value if each not in Span.model_fields]:
                    hint = nearest(strange[0], Span.model_fields)
                    raise InputError(f"{key}.{strange[0]}: there is no such key{hint}; it has low and high")
                return Span.model_validate_json(json.dumps(value))
            kind = TypeAdapter(list[Annotated[float, Field(gt=0, le=FARTHEST, allow_inf_nan=False)]])
            listed = value if isinstance(value, list) else [value]
            found = kind.validate_json(json.dumps(listed), strict=True)
        except ValidationError as error:
            raise InputError(_explain(error, key)) from None
        if not found:
            raise InputError(f"{key} = []: expected rates to try, as in [1e-4, 1e-3]")
        return tuple(sorted(set(found)))


@dataclasses.dataclass(frozen=True)
class Contest:
    """One combination of an experiment with `tune`, its seed aside: the rates that compete for it."""

    settings: Mapping[str, Any]
    """Of a run, without rate and seed."""
    rates: Rates
    tune: Tune
    seeds: tuple[int, ...]
    """Of the runs that are reported."""

    @property
    def settled(self) -> bool:
        """Whether there is a single rate, which nothing need be tried for."""
        return isinstance(self.rates, tuple) and len(self.rates) == 1

    @property
    def lowest(self) -> float:
        """The lowest of the rates."""
        return self.rates.low if isinstance(self.rates, Span) else self.rates[0]

    def tried(self, rate: float) -> list[RunConfig]:
        """The runs that say what a rate is worth, one per seed of `tune`, scored on rows that are not reported."""
        own = {**self.settings, "learning_rate": rate, "tuning": self.tune.share}
        return [_run_config({**own, "seed": seed}) for seed in self.tune.seeds]

    def reported(self, rate: float) -> list[RunConfig]:
        """The runs at the rate that was chosen; the rows to evaluate on are looked at once, at the end."""
        own = {**self.settings, "learning_rate": rate, "eval_every": 0}
        return [_run_config({**own, "seed": seed}) for seed in self.seeds]


class Published(BaseModel):
    """What of the papers an experiment is to stand beside.

    Attributes:
        tables: of `rankwise papers`, as `lora/e2e_gpt2_medium`.
        differs: what in the file is known not to be as in the paper, in words.
        changed: settings from the command line; `load` fills it in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tables: list[str] = Field(min_length=1, description="tables and figures of `rankwise papers`")
    differs: str = Field(default="", description="what is known not to be as in the paper")
    changed: list[str] = Field(default_factory=list, description="settings from the command line; written by rankwise")


class Experiment(BaseModel):
    """Many runs: what they share (`base`, fields of RunConfig) and what differs between them (`vary`).

    With `chain`, every combination is a chain of runs: each begins with what the one before has trained, under the
    settings of its stage and with a schedule of its own. With `tune`, the learning rate of every combination is chosen
    first, on rows that are not reported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    base: dict[str, Any]
    vary: dict[str, list[Any]]
    chain: list[dict[str, Any]] = Field(default_factory=list)
    tune: Tune | None = None
    report: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    published: Published | None = None
    runs: str

    def configs(self, fit: Callable[[RunConfig], RunConfig] = lambda config: config) -> Iterator[RunConfig]:
        """Every combination of the axes, the last axis fastest, each with its stages one after the other.

        A method of the axis `method` that brings its own `learning_rate: [..]` is run at those rates and no others.
        With `tune` these are the runs that are reported, at the lowest rate in place of the one yet to be chosen.
        What else of OWN an entry brings takes the place of the shared setting. `fit` completes a run whose size its
        budget has to choose. Raises InputError for a combination that is no valid run.
        """
        if self.tune is not None:
            for contest in self.contests():
                yield from map(fit, contest.reported(contest.lowest))
            return
        for data in self.combinations():
            before: RunConfig | None = None
            for place, stage in enumerate(self.chain or [{}]):
                settings = {**data, "followed": place < len(self.chain) - 1, "after": before and before.digest()}
                for key, value in stage.items():
                    _put(settings, key, value)
                before = fit(_run_config(settings))
                yield before

    def contests(self) -> Iterator[Contest]:
        """Every combination of the axes but `seed`, with the rates to choose from; none without `tune`."""
        if self.tune is None:
            return
        seeds = tuple(self.vary.get("seed", [self.base.get("seed", 0)]))
        for data, own in self._combinations({key: values for key, values in self.vary.items() if key != "seed"}):
            key = "tune.learning_rate" if own is None else f"learning_rate of {data['method'].get('name')}"
            yield Contest(data, self.tune.rates(own, key), self.tune, seeds)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The settings of every combination of the axes and of each method's own rates, the stages of a chain aside."""
        for data, rates in self._combinations(self.vary):
            if rates is None:
                yield data
                continue
            if "learning_rate" in self.vary and data["learning_rate"] != self.vary["learning_rate"][0]:
                continue  # the method's own rates take the place of the axis: once, not once per value
            for rate in rates if isinstance(rates, list) else [rates]:
                yield {**data, "learning_rate": rate}

    def _combinations(self, axes: Mapping[str, list[Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
        """The settings of every combination of `axes`, and the rates that its method brings, if it does."""
        for values in itertools.product(*axes.values()):
            data: dict[str, Any] = {**self.base, "runs": self.runs}
            chosen = dict(zip(axes, values, strict=True))
            # the method first: `method.rank` then sets an option of the method just chosen
            for key in sorted(chosen, key=lambda key: key.count(".")):
                _put(data, key, chosen[key])
            method = named("method", data.get("method", {"name": "lora"}))
            rates = method.pop("learning_rate", None)
            data["method"] = method
            for key in ("method", "task"):
                if data.get(key) is not None:
                    data[key] = part = named(key, data[key])
                    data |= {own: part.pop(own) for own in OWN[key] if own in part}
            yield data, rates


def load(
    source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] = (), schema: Schema = Schema({}, {})
) -> RunConfig | Experiment:
    """The configuration in `source` (a YAML file, or a mapping) with `key=value` overrides applied, fully checked.

    A file with `vary:` is an Experiment, any other a RunConfig. Method options come back complete, defaults filled in.
    In an experiment an override of a varied key replaces that axis (`seed=0`, `seed=[0,1]`), `method=NAME` keeps the
    varied methods of that name, and `method.OPTION=value` reaches every varied method that has the option.
    At `scale: smoke` what stands in the file's `smoke:` comes first, as if given in the same way.
    Raises InputError for everything that is wrong with the file or the values.
    """
    name, where = "experiment", ""
    if source is None:
        data: dict[str, Any] = {}
    elif isinstance(source, Mapping):
        data = _mapping(source)
    else:
        name, where = Path(source).stem, f"{source}: "
        data = read_yaml(Path(source))
    if {"id", "made_with"} <= data.keys():
        data = {key: value for key, value in data.items() if key not in WRITTEN}
    settings = [_override(text) for text in overrides]
    try:
        if isinstance(published := data.get("published"), dict):
            data["published"] = {"changed": _changed(settings), **published}
        groups = [_smoke(data, settings), settings]
        if "vary" in data or any(key.startswith("vary.") for group in groups for key, _ in group):
            return _experiment(data, groups, schema, name)
        for key, value in itertools.chain(*groups):
            _put(data, key, value)
        return _complete(_run_config(data), schema)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def _mapping(source: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what a caller gives in Python, in which paths and the like are text."""
    try:
        data: dict[str, Any] = json.loads(json.dumps(dict(source), default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"settings that cannot be written as YAML: {error}") from None
    return _plain(data)


def _smoke(data: dict[str, Any], settings: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What `smoke:`, which is taken out of `data`, sets at the scale that is asked for."""
    given = data.pop("smoke", None)
    if given is not None and not isinstance(given, dict):
        raise InputError(f"smoke = {_shown(given)}: expected settings, as in `smoke: {{model: random-gpt2}}`")
    scale = dict(settings).get("scale", data.get("scale"))
    return [(str(key), value) for key, value in (given or {}).items()] if scale == "smoke" else []


def load_method(name: str, overrides: Sequence[str], schema: Schema) -> tuple[dict[str, Any], list[str]]:
    """The method `name` with its `key=value` options checked and all defaults filled in, and what `head=[…]` names.

    Raises InputError for an unknown method or option, and for a value out of range.
    """
    options = dict(_override(text) for text in overrides)
    if "name" in options:
        raise InputError("name: is no option; the method is named once")
    head = options.pop("head", [])
    head = [head] if isinstance(head, str) else head
    if not isinstance(head, list) or not all(isinstance(part, str) for part in head):
        raise InputError(f"head = {_shown(head)}: expected names of modules, as in head=[classifier]")
    given = {key.removeprefix("method."): value for key, value in options.items()}
    return _checked("method", schema.methods, {**given, "name": name}), head


def load_options(key: str, name: str, overrides: Sequence[str], known: Mapping[str, type]) -> dict[str, Any]:
    """The `key=value` options of `known[name]`, checked and with all defaults filled in; `key` is for the messages.

    Raises InputError for an unknown name or option, and for a value out of range.
    """
    options = dict(_override(text) for text in overrides)
    if "name" in options:
        raise InputError(f"name: is no option; the {key} is named once")
    checked = _checked(key, known, {**options, "name": name})
    return {option: value for option, value in checked.items() if option != "name"}


def json_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors: one run or an experiment."""
    result = RunConfig.model_json_schema()
    properties = result["properties"]
    for key, known, words in (("method", schema.methods, ["name"]), ("task", schema.tasks, ["name", "type"])):
        parts = [_part_schema(name, kind, words) for name, kind in sorted(known.items())]
        properties[key] = {"oneOf": [{"enum": sorted(known)}, *parts]}
    properties["method"]["default"] = {"name": "lora"}
    properties["vary"] = {
        "type": "object",
        "description": "axes of an experiment: dotted key -> list of values",
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    properties["chain"] = {
        "type": "array",
        "description": "stages, each of settings; a run begins with what the run of the stage before has trained",
        "items": {"type": "object", "minProperties": 1},
        "minItems": 1,
    }
    properties["tune"] = Tune.model_json_schema()
    properties["report"] = {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "text": {"type": "string"},
            "reference": {
                "description": "what the other methods are measured against: a method, or its name with some options",
                "type": ["string", "object"],
            },
        },
        "additionalProperties": False,
    }
    properties["smoke"] = {
        "type": "object",
        "description": "settings that `scale: smoke` takes before those of the command line: dotted key -> value",
    }
    properties["published"] = Published.model_json_schema()
    result["anyOf"] = [{"required": ["task"]}, {"required": ["vary"]}]
    result.pop("required", None)
    result["title"] = "rankwise configuration"
    return result


def _part_schema(name: str, kind: type, words: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of one method or task with its options; its name stands at one of `words`."""
    options: dict[str, Any] = {word: {"const": name} for word in words}
    required = []
    for field, hint in _options(kind).items():
        options[field.name] = TypeAdapter(hint).json_schema()
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if made is not dataclasses.MISSING:
            options[field.name]["default"] = TypeAdapter(hint).dump_python(made, mode="json")
        else:
            required.append(field.name)
    return {
        "type": "object",
        "description": (kind.__doc__ or "").strip().partition("\n")[0],
        "properties": options,
        "required": required,
        "oneOf": [{"required": [word]} for word in words],
        "additionalProperties": False,
    }


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, a key given twice is an error, and so is what means too much.

    Whatever is wrong is a `yaml.YAMLError` that knows its line.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}
        """How many values each node that is complete stands for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        begun = self._values
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEEPEST} levels", mark)
        self._values += 1
        node = super().compose_node(parent, index)
        if alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands within what it stands for", mark)
        if node is not None:
            self._values += self._sizes.get(node, 1) - 1 if alias else 0
            self._sizes.setdefault(node, self._values - begun)
        if self._values > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES:,} values", mark)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            problem = f"a number of {len(node.value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # of what kind depends on the value: int("x"), a month 13, base64
            problem = f"{_shown(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {_shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """The other way: a word that `_Loader` would read as a number, such as the id 1285e1020756, is put in quotes."""


# YAML 1.1 asks for a dot in a float, so that SafeLoader reads the learning rate 1e-3 as a word.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def as_yaml(content: Mapping[str, Any]) -> str:
    """`content` in YAML, which `parse_yaml` reads as just that."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """The value of a piece of YAML, numbers like 1e-3 included: None, bool, int, float, str, lists and mappings.

    Raises InputError, one line, where it is broken, means too much, or holds what is none of these.
    """
    if len(text) > LONGEST:
        raise InputError(f"{len(text):,} characters of YAML: no configuration has more than {LONGEST:,}")
    try:
        value = yaml.load(text, Loader=_Loader)
    except Exception as error:  # a YAMLError, or whatever its constructors come upon
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{line}not valid YAML: {' '.join(str(problem).split())}") from None
    return _plain(value)


def _plain(value: Any, where: str = "") -> Any:
    """A copy of `value`, with dates as text. InputError for a text or a key that no file and no name can hold."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime.date):  # a time of day included
        return str(value)
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise InputError(f"{where}{_shown(value)} holds a character that no text may have: leave it out")
        return value
    if isinstance(value, list):
        return [_plain(each, where) for each in value]
    if not isinstance(value, dict):
        raise InputError(f"{where}{_shown(value)} is a {type(value).__name__}: expected text, numbers, lists or keys")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{where}the key {_shown(key)} is no text: put it in quotes")
        if not _encodable(key) or not key.isprintable() or len(key) > LONGEST_NUMBER:
            raise InputError(f"{where}{_shown(key)} is no key: a key is one line of printable text, and not a long one")
    return {key: _plain(each, f"{key}: ") for key, each in value.items()}


def _encodable(text: str) -> bool:
    """Whether `text` can be written in UTF-8, which halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """`value` for a message: on one line, and not much of it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}…"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError, one line, for a file that is missing, unreadable or no mapping."""
    try:
        text = read_bytes(path).decode()
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"{path}: there is no such file{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    try:
        data = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if data is None:
        raise InputError(f"{path}: is empty; the least it needs is `task: NAME`")
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected `key: value` lines, found a {type(data).__name__}")
    return data


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"{_shown(text)}: expected key=value, as in learning_rate=1e-3")
    _plain({key: None})
    try:
        return key, parse_yaml(value)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def named(key: str, value: Any) -> dict[str, Any]:
    """What stands at `method` or `task` as a mapping: a name alone, or a mapping; a task's `type` is its name."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        example = NAMED[key]
        raise InputError(f"{key} = {_shown(value)}: expected a name or a mapping, as in `{key}: {{name: {example}}}`")
    if key == "task" and "type" in value and "name" not in value:
        return {"name" if option == "type" else option: each for option, each in value.items()}
    return dict(value)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. The mapping below it is copied first: the combinations must not share it."""
    head, dot, rest = key.partition(".")
    if not dot:
        data[head] = value
    elif head in NAMED:
        part = named(head, data.get(head, {"name": "lora"} if head == "method" else {}))
        data[head] = {**part, "name" if (head, rest) == ("task", "type") else rest: value}
    elif head in ("vary", "tune", "report"):
        below = data.get(head)
        data[head] = {**(below if isinstance(below, dict) else {}), rest: value}
    else:
        raise InputError(f"{key}: only {', '.join(NAMED)}, vary, tune and report have keys below them")


def _run_config(data: Mapping[str, Any]) -> RunConfig:
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
        raise InputError(_explain(error)) from None


def _explain(error: ValidationError, key: str = "") -> str:
    """One line for the first key that is wrong; a union's alternatives are joined by `or`."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    place = key or ".".join(map(str, first["loc"][:1])) or "settings"
    expected = dict.fromkeys(
        item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        for item in error.errors()
        if key or item["loc"][:1] == first["loc"][:1]
    )
    return f"{place} = {_shown(first['input'])}: expected {' or '.join(expected)}"


def _options(kind: type) -> dict[dataclasses.Field[Any], Any]:
    """Fields of a method's or a task's dataclass that are options, with their types, in which numbers have bounds."""
    hints = typing.get_type_hints(kind)
    return {field: _bounded(hints[field.name]) for field in dataclasses.fields(kind) if field.init}


def _bounded(hint: Any) -> Any:
    """A type in which no whole number is beyond LARGEST, and no other beyond FARTHEST."""
    if hint is int:
        return Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    if hint is float:
        return Annotated[float, Field(ge=-FARTHEST, le=FARTHEST, allow_inf_nan=False)]
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if not parts or kind in (Literal, Annotated):
        return hint
    bounded = tuple(map(_bounded, parts))
    return typing.Union[bounded] if kind in (types.UnionType, typing.Union) else kind[bounded]  # noqa: UP007


@functools.cache
def _adapters(kind: type) -> dict[str, TypeAdapter[Any]]:
    """What checks each option of a method or a task; an experiment asks for them once per run and method."""
    return {field.name: TypeAdapter(hint) for field, hint in _options(kind).items()}


def _complete(config: RunConfig, schema: Schema) -> RunConfig:
    """`config` with its task and its method checked, and their options filled in."""
    task = _checked("task", schema.tasks, config.task)
    method = _checked("method", schema.methods, config.method, config.budget is not None)
    return config.model_copy(update={"task": task, "method": method})


def _checked(key: str, known: Mapping[str, type], given: Mapping[str, Any], fitted: bool = False) -> dict[str, Any]:
    """`given`, the name and options of a method or a task, checked and with all defaults filled in.

    Where a budget is to be met (`fitted`) the options that say how much trains stay open, unless they are given.
    """
    name = given.get("name")
    if name is None:
        raise InputError(f"{key}: needs a name, as in `{key}: {{name: {NAMED[key]}}}`")
    if name not in known:
        raise InputError(
            f"{key} = {_shown(name)}: no such {key}{nearest(name, known)}; known: {', '.join(sorted(known))}"
        )
    kind = known[name]
    options = _adapters(kind)
    values: dict[str, Any] = {}
    for option, value in given.items():
        if option == "name":
            continue
        if option not in options:
            hint = nearest(option, options) or (f"; its options: {', '.join(options)}" if options else "; it has none")
            raise InputError(f"{key}.{option}: {name} has no such option{hint}")
        try:
            values[option] = options[option].validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise InputError(_explain(error, f"{key}.{option}")) from None
    try:
        made = kind(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{key} {name}: {str(error).partition(chr(10))[0]}") from None
    full = {option: adapter.dump_python(getattr(made, option), mode="json") for option, adapter in options.items()}
    sizes = getattr(kind, "sizes", ()) if fitted else ()
    left_open = () if any(option in values for option in sizes) else sizes
    return {"name": name, **{option: value for option, value in full.items() if option not in left_open}}


def _experiment(
    data: dict[str, Any], groups: Sequence[Sequence[tuple[str, Any]]], schema: Schema, name: str
) -> Experiment:
    """The experiment of a file's `data`, changed by each group of settings in turn."""
    data, keys, tuned = dict(data), [*RunConfig.model_fields], data.get("tune") is not None
    for group in groups:
        for key, value in group:
            if key.startswith(("vary.", "tune.", "report.")):
                _put(data, key, value)
        vary = _axes(data.get("vary"), keys)
        data["vary"] = vary
        for key, value in group:
            if not key.startswith(("vary.", "tune.", "report.")):
                _override_experiment(data, vary, key, value, schema)
    settings = [*itertools.chain(*groups)]
    del data["vary"]
    report = data.pop("report", None) or {}
    published = _published(data.pop("published", None))
    chain = _chain(data.pop("chain", None), keys)
    for key, _ in settings:
        if any(key in stage or key.partition(".")[0] in stage for stage in chain):
            raise InputError(f"{key}: the stages of the chain set it; change the file, or give chain=[…]")
    for key, instead in _BY_SECTION.items():
        if any(key in part for part in (data, vary, *chain)):
            raise InputError(f"{key}: no setting of an experiment; {instead}")
    tune = _tune(data.pop("tune", None), {**data, **vary}, chain)
    if tuned and tune is None and not _rated(data, vary):
        raise InputError("tune = null: give a rate instead, learning_rate=1e-3 or vary.learning_rate=[1e-4, 1e-3]")
    runs = data.pop("runs", None) or f"runs/{name}"
    for key in data:
        if key not in RunConfig.model_fields:
            raise InputError(f"{key}: there is no such key{nearest(key, [*keys, *SECTIONS])}")
    report = _report(report, schema) if isinstance(report, dict) else report
    try:
        experiment = Experiment(
            name=name, base=data, vary=vary, chain=chain, tune=tune, report=report, published=published, runs=runs
        )
    except ValidationError as error:
        raise InputError(_explain(error)) from None
    _check_size(experiment)
    # Each combination is checked here, so that a sweep cannot stumble over its last run hours later.
    by_digest: dict[str, RunConfig] = {}
    for config in experiment.configs():
        _complete(config, schema)
        by_digest[config.digest()] = config
        if config.after is not None:
            _check_link(by_digest[config.after], config, schema)
    fitted = (vary.get("budget") or [data.get("budget")]) != [None]
    for key, known in (("method", schema.methods), ("task", schema.tasks)):
        if key in vary:
            vary[key] = [_filled(key, entry, known, vary, fitted) for entry in vary[key]]
        elif f"{key}.name" not in vary and (key == "method" or key in data):
            data[key] = _filled(key, named(key, data.get(key, {"name": "lora"})), known, vary, fitted)
        for stage in chain:
            if key in stage:
                stage[key] = _filled(key, named(key, stage[key]), known, {}, fitted)
    return experiment.model_copy(update={"base": data, "vary": vary, "chain": chain})


def _check_size(experiment: Experiment) -> None:
    """Refuse an experiment of so many runs that listing them would not end."""
    stages = max(1, len(experiment.chain))
    count = 0
    if experiment.tune is None:
        for _ in itertools.islice(experiment.combinations(), MOST_RUNS // stages + 1):
            count += stages
    for contest in experiment.contests():
        tries = contest.tune.trials or 0 if isinstance(contest.rates, Span) else len(contest.rates)
        count += len(contest.seeds) + tries * len(contest.tune.seeds)
        if count > MOST_RUNS:
            break
    if count > MOST_RUNS:
        raise InputError(
            f"vary: more than {MOST_RUNS:,} runs, and an experiment may have so many: leave out values, or split it"
        )


def _axes(vary: Any, keys: Sequence[str]) -> dict[str, list[Any]]:
    """What stands at `vary:`, checked, with methods and tasks spelled out."""
    if not isinstance(vary, dict) or not vary:
        raise InputError("vary: expected axes, as in `vary: {seed: [0, 1, 2]}`")
    for axis, values in vary.items():
        if str(axis).partition(".")[0] not in keys or axis == "runs":
            raise InputError(f"vary.{axis}: there is no such key{nearest(axis, keys)}")
        if not isinstance(values, list) or not values:
            raise InputError(f"vary.{axis} = {_shown(values)}: expected a list of values, as in `{axis}: [..]`")
    vary = {axis: [named(axis, each) for each in values] if axis in NAMED else values for axis, values in vary.items()}
    for entry in vary.get("method", []):
        if entry.get("learning_rate") == []:
            raise InputError(f"vary.method: {entry.get('name')} has an empty list of learning rates")
    return vary


def _rated(data: Mapping[str, Any], vary: Mapping[str, Any]) -> bool:
    """Whether every run is given a learning rate, be it by its method."""
    methods = vary.get("method", [])
    return "learning_rate" in {**data, **vary} or bool(methods and all("learning_rate" in each for each in methods))


def _tune(given: Any, others: Mapping[str, Any], chain: Sequence[Any]) -> Tune | None:
    """What stands at `tune:`, checked; None where it is absent. `others` are the other settings and axes."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InputError(f"tune = {_shown(given)}: expected settings, as in `tune: {{learning_rate: [1e-4, 1e-3]}}`")
    for key in given:
        if key not in Tune.model_fields:
            raise InputError(f"tune.{key}: there is no such key{nearest(key, Tune.model_fields)}")
    if chain:
        raise InputError("tune: the rates of a chain cannot be tuned; give every stage its learning_rate")
    if "learning_rate" in others:
        raise InputError("learning_rate: tune chooses it; give rates to choose from as tune.learning_rate=[..]")
    for key in ("trials", "seeds"):  # None is a value of the first, and no list the other
        if key in given and given[key] is None:
            raise InputError(f"tune.{key}: is empty; leave it out or give a value")
    try:
        tune = Tune.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise InputError(_explain(error, f"tune.{error.errors()[0]['loc'][0]}")) from None
    if len(set(tune.seeds)) < len(tune.seeds):
        raise InputError(f"tune.seeds = {tune.seeds}: expected different numbers")
    if tune.trials is not None and isinstance(tune.learning_rate, list):
        raise InputError("tune.trials: a list of rates is tried whole; give {low: .., high: ..} to try some of a range")
    if tune.learning_rate is not None:
        tune.rates()
    return tune


def _report(given: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """What stands at `report:`, checked: two texts, and the method that the others are measured against."""
    known = ("title", "text", "reference")
    for key, value in given.items():
        if key not in known:
            raise InputError(f"report.{key}: there is no such key{nearest(key, known)}")
        if key != "reference" and not isinstance(value, str):
            raise InputError(f"report.{key} = {_shown(value)}: expected string")
    if "reference" not in given:
        return dict(given)
    try:
        reference = named("method", given["reference"])
        _checked("method", schema.methods, reference, fitted=True)
    except InputError as error:
        raise InputError(f"report.reference: {error}") from None
    return {**given, "reference": reference}


def _changed(settings: Sequence[tuple[str, Any]]) -> list[str]:
    """Of what was set on the command line what may be against a paper's protocol and no table shows."""
    aside = ("runs", "seed", "scale", "model", "report")
    return [f"{key}={json.dumps(value)}" for key, value in settings if key.partition(".")[0] not in aside]


def _published(given: Any) -> Published | None:
    """The section `published:`, checked; None where it is absent."""
    try:
        return None if given is None else Published.model_validate(given)
    except ValidationError:
        example = "`tables: [NAME, …]`, of `rankwise papers`, and perhaps `differs: WORDS`"
        raise InputError(f"published = {_shown(given)}: expected {example}") from None


def _chain(stages: Any, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The stages of `chain:`, checked; none where it is absent."""
    if stages is None:
        return []
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) and stage for stage in stages):
        raise InputError("chain: expected a list of settings, as in `chain: [{method.sparsity: 0.1}, {epochs: 1}]`")
    for key in (key for stage in stages for key in stage):
        if str(key).partition(".")[0] not in keys or key in ("runs", "model"):
            raise InputError(f"chain: {key} cannot differ between the stages of one chain{nearest(key, keys)}")
    return stages


def _check_link(before: RunConfig, config: RunConfig, schema: Schema) -> None:
    """Refuse a stage that cannot begin with what the one before has trained."""
    first, second = before.method["name"], config.method["name"]
    if first != second and not getattr(schema.methods[first], "whole", False):
        raise InputError(f"chain: {second} cannot follow {first}; only what trains the whole model can be followed so")


def _filled(
    key: str, entry: dict[str, Any], known: Mapping[str, type], vary: Mapping[str, Any], fitted: bool
) -> dict[str, Any]:
    """A method or task with its defaults written out; the settings of the run that it brings along are kept."""
    own = {option: entry[option] for option in OWN[key] if option in entry}
    given = {option: each for option, each in entry.items() if option not in own and f"{key}.{option}" not in vary}
    return {**_checked(key, known, given, fitted), **own}


def _override_experiment(
    data: dict[str, Any], vary: dict[str, list[Any]], key: str, value: Any, schema: Schema
) -> None:
    """Let an override win over the axes, where the plain value in `base` would be overruled by them unseen."""
    entries: list[dict[str, Any]] = vary.get("method", [])
    if key in ("method", "method.name") and entries and isinstance(value, str):
        vary["method"] = [entry for entry in entries if entry.get("name") == value] or [{"name": value}]
    elif key in vary:
        vary[key] = value if isinstance(value, list) else [value]
        if key in NAMED:
            vary[key] = [named(key, entry) for entry in vary[key]]
    elif key.partition(".")[0] in NAMED and vary.get(part := key.partition(".")[0]):
        option, known = key.partition(".")[2], getattr(schema, f"{part}s")
        having = [entry for entry in vary[part] if _has(known, entry, option)]
        if not having:
            names = {field.name for kind in known.values() for field in _options(kind)}
            raise InputError(f"{key}: none of the varied {part}s has this option{nearest(option, names)}")
        for entry in having:
            entry[option] = value
    else:
        _put(data, key, value)
    for part, own in OWN.items():
        for entry in vary.get(part, []) if key in own else []:
            entry.pop(key, None)


def _has(known: Mapping[str, type], entry: Mapping[str, Any], option: str) -> bool:
    kind = known.get(str(entry.get("name")))
    return kind is not None and option in {field.name for field in _options(kind)}
