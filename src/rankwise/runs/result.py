"""The result of a run: the content of its `result.json`, which `train.result` writes last and everything else reads.

What the run is for and whether its rate was tuned is only in its `run.yaml`; `Finished` has the content of both files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from rankwise.files import read_json, remembered
from rankwise.runs.answers import Answers, undamaged
from rankwise.runs.kinds import Amount, Count, Flag, Number, Text
from rankwise.runs.record import damaged
from rankwise.runs.search import Search
from rankwise.settings import Kind

FILE = "result.json"


@dataclass(frozen=True)
class Split:
    """Rows that a run was trained or scored on.

    Attributes:
        name: as the task calls it.
        rows: how many.
        official: whether published numbers are computed on these rows.
        note: why not, or anything else worth knowing about them.
        own: what to call rows of the user's own, such as "your own data"; "" for others.
    """

    name: Text
    rows: Count
    official: Flag
    note: Text = ""
    own: Text = ""

    @property
    def unofficial(self) -> bool:
        """Whether numbers on these rows could be mistaken for published ones; the user's own data has none."""
        return not self.official and not self.own


@dataclass(frozen=True)
class Splits:
    """The rows that a run was trained on, and those that it was scored on, the main split first."""

    train: Split
    evaluation: Annotated[Sequence[Split], Field(min_length=1)]


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters: the most at once, those at the end and the budget, all without the head; and the head's."""

    trainable: Count
    final: Count
    budget: Count
    head: Count


@dataclass(frozen=True)
class Cost:
    """In seconds, in training rows a second, and in bytes of the main process's peak memory and of the saved adapter.

    The adapter's are without padding. `processes` trained together; `micro_batch` is how many rows went through the
    model at once, as set or after memory had run out. Both are None if they are as usual.
    """

    seconds: Amount
    peak_memory_bytes: Count
    examples_per_second: Amount
    adapter_bytes: Count
    processes: Count | None = None
    micro_batch: Count | None = None


@dataclass(frozen=True)
class Benchmark:
    """What a task is part of, and what counts in its average.

    `majority` is what would count if the answer were always the most frequent class; None if that is not known.
    """

    name: Text
    score: Number
    majority: Number | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run.

    Attributes:
        run: the id of the run.
        task, method, options, model: the task's label, the method's name and options, the model's name.
        seed, learning_rate: as set.
        score: name of the main metric, "" without labels.
        benchmark: None for a task that is part of none, and for a run that only tries a rate.
        metrics: all metrics by name.
        splits, parameters, cost: see their classes.
        search: the outcome of the search of a method that learns ranks; None for others.
        notes: what to know before quoting the metrics.
        answers: how often each answer was given, for each split, the main split first; empty if that is damaged.
        weights: SHA-256 of what the next stage of a chain begins with; "" if none follows.
    """

    run: Text
    task: Text
    method: Text
    options: Mapping[Text, Any]
    model: Text
    seed: Count
    learning_rate: Amount
    score: Text
    benchmark: Annotated[Benchmark | None, BeforeValidator(lambda given: given or None)] = None
    metrics: Mapping[Text, Number]
    splits: Splits
    parameters: Parameters
    search: Search | None = None
    notes: Sequence[Text] = field(default_factory=list)
    answers: Annotated[Sequence[Answers], BeforeValidator(undamaged)] = field(default_factory=list)
    weights: Text = ""
    cost: Cost

    def as_json(self) -> dict[str, Any]:
        """The content of the file, without optional parts that have no value."""
        content = {**asdict(self), "answers": [each.in_result() for each in self.answers]}
        benchmark, cost, splits = content["benchmark"] or {}, content["cost"], content["splits"]
        content["benchmark"] = benchmark
        optional = [(content, "search"), (content, "weights"), (benchmark, "majority")]
        optional += [(cost, "processes"), (cost, "micro_batch")]
        optional += [(split, "own") for split in (splits["train"], *splits["evaluation"])]
        for part, key in optional:
            if part.get(key) in (None, ""):
                part.pop(key, None)
        return content


@dataclass(frozen=True, kw_only=True)
class Finished(Result):
    """A finished run: its result with its `run.yaml`.

    Attributes:
        folder: its folder.
        kind, tuned: what it is for, and whether `tune:` has chosen its rate.
        config: all settings, except where it is stored and how its rate was chosen.
        lineage: settings, without the seed, of the runs before it in a chain, the first one first.
    """

    folder: Path
    kind: Kind
    tuned: bool
    config: Mapping[str, Any]
    lineage: Sequence[Mapping[str, Any]]


_RESULT = TypeAdapter(Result)


def read(folder: Path) -> Result:
    """The result of a run. FileNotFoundError if there is none, InputError, one line, if it is damaged."""
    return remembered(_read, folder / FILE)


def _read(path: Path) -> Result:
    try:
        return _RESULT.validate_python(read_json(path))
    except ValidationError as error:
        raise damaged(path, error) from None
