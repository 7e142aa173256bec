"""What the model of a run will see of its data, for people and as plain data, without reading weights."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise import seen as sight
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.results import seen as results
from rankwise.results.formats import plain
from rankwise.runs.data import Seen, SeenRow, SeenSplit
from rankwise.settings import Experiment, RunConfig, complete, load
from rankwise.settings.yaml_files import quoted
from rankwise.sweep.check import Source, load_one, schema
from rankwise.tasks import Evaluation, subset
from rankwise.train import model as models

ROWS = 10
"""Rows that are shown at random."""
DECIDES = ("task", "train_rows", "eval_rows", "model", "max_length", "trust_remote_code")
"""Settings that decide what a model sees; of images, the first three."""


@dataclass(frozen=True)
class View:
    """What is seen, and whether it is a single row in full."""

    seen: Seen
    alone: bool

    @classmethod
    def of(cls, source: Source | None, settings: Sequence[str], number: int | None = None) -> "View":
        """Of a run, a file, or settings alone; `number`: that row alone, of each split that has it.

        Raises InputError for what a run would refuse about its data, its tokenizer and the length of its rows, for an
        experiment whose runs do not all see the same, and for a row that is not there.
        """
        config = _config(source, settings)
        task = tasks.build(config.task)
        train = subset(task.train(), config.train_rows)
        splits = [train, *(subset(split, config.eval_rows) for split in task.evaluation())]
        model, processor = models.without_weights(
            config.model, task, config.max_length, train, config.trust_remote_code
        )
        reader = sight.Reader.of(model, processor, config.max_length)
        encoded = [Evaluation(split, task.encode(split, processor, config.max_length)) for split in splits]
        for each in encoded:
            task.check(model, processor, each.examples, each.split.name)
        rows: list[SeenRow] = []
        if processor is not None and number is None:
            rows = sight.drawn(task, encoded[0], reader, ROWS)
        elif processor is not None and number is not None:
            rows = [row for each in encoded for row in sight.numbered(task, each, number, reader)]
            if not rows:
                raise InputError(f"--row {number}: {_range(encoded)}")
        elif number is not None:
            raise InputError(f"--row {number}: the rows of {task.name} are images, which have no tokens to show")
        name = models.label(config.model, task)
        found = Seen(task.label, name, reader.max_length, sight.of_splits(task, encoded, reader), rows)
        return cls(found, number is not None)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self.seen)

    def lines(self) -> Iterator[tuple[str, bool]]:
        """Lines of text, and whether each holds what is learnt."""
        if not self.alone:
            yield results.caption(self.seen), False
            yield "", False
            yield from ((line, False) for line in _tables(self.seen.splits).splitlines())
        for row in self.seen.rows:
            yield "", False
            yield from _row(row, self.alone)


def _config(source: Source | None, settings: Sequence[str]) -> RunConfig:
    """The settings of a run, or those that all runs of an experiment share."""
    if isinstance(source, str | Path) and Path(source).is_dir():
        return load_one(source, settings)
    config = load(source, settings, schema())
    if not isinstance(config, Experiment):
        return config
    runs = [complete(each, schema()) for each in config.configs]
    images = tasks.registry()[runs[0].task["name"]].family == "segmentation"
    for key in DECIDES[:-3] if images else DECIDES:
        values = [getattr(each, key) for each in runs]
        if others := [value for value in values if value != values[0]]:
            first, second = (quoted(value["name"] if key == "task" else value) for value in (values[0], others[0]))
            raise InputError(f"{source}: {key} differs between the runs, {first} or {second}; choose one, {key}=…")
    return runs[0]


def _range(encoded: Sequence[Evaluation]) -> str:
    """Which rows there are, in words."""
    numbers = {each.split.name: sight.numbers(each) for each in encoded}
    return "; ".join(f"{name} has rows {min(own)} to {max(own)}" for name, own in numbers.items())


def _tables(splits: Sequence[SeenSplit]) -> str:
    parts = [plain(*results.by_split(splits)), *(line for each in splits for line in results.remarks(each))]
    if any(each.classes for each in splits):
        parts.append("\n" + plain(*results.by_class(splits)))
    return "\n".join(parts)


def _row(row: SeenRow, alone: bool) -> Iterator[tuple[str, bool]]:
    """A row as text, and if it is `alone` every token of it, too."""
    learnt = f", {sum(row.learnt):,} learnt" if any(row.learnt) else ""
    yield f"{row.place} of {row.split}: {len(row.ids):,} tokens{learnt}", False
    for text, own in [*row.segments, *([(row.label, True)] if row.label else [])]:
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            yield f"  {'learns' if own else 'reads':<6}  {visible(line)}", own
    if alone:
        yield "", False
        cells = [
            [str(place), str(each), visible(word), "learnt" if own else ""]
            for place, (each, word, own) in enumerate(zip(row.ids, row.words, row.learnt, strict=True))
        ]
        lines = plain(["token", "id", "text", ""], cells).split("\n")
        yield from zip(lines, [False, False, *row.learnt], strict=True)


_SIGNS = {" ": "·", "\t": "→", "\n": "⏎"}


def visible(text: str) -> str:
    """`text` with signs for blanks, tabs and ends of lines; other white space and these signs themselves are spelt."""

    def sign(letter: str) -> str:
        spelt = letter == "\r" or letter in _SIGNS.values() or unicodedata.category(letter) == "Zs"
        return _SIGNS.get(letter) or (letter.encode("unicode_escape").decode() if spelt else letter)

    return "".join(map(sign, text))
