"""Scores of adapters, runs and models on the same rows, each against the first: `rankwise evaluate`."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.commands.ready import Ready, config_of
from rankwise.errors import InputError
from rankwise.files import similar
from rankwise.metrics.bootstrap import Predictions, interval
from rankwise.metrics.metric import Interval
from rankwise.results.formats import plain, span
from rankwise.tasks import Split, Task, subset
from rankwise.tasks.base import REFERENCES


@dataclass(frozen=True)
class Score:
    """The scores of one adapter, run or model.

    Attributes:
        name: as it was given.
        metrics: by name, with the loss.
        interval: 95 % interval of the main metric over the rows; None where there is none.
        gap: of the main metric, to that of the first; None for the first, and where one has none.
        gap_interval: 95 % paired-bootstrap interval of the gap over the rows.
        notes: what to know before quoting the metrics.
    """

    name: str
    metrics: Mapping[str, float]
    interval: Interval | None
    gap: float | None
    gap_interval: Interval | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Evaluated:
    """Scores on the same rows.

    Attributes:
        task: its label.
        rows: how many, and where they are from.
        score: name of the main metric.
        scores: in the order in which they were asked for.
    """

    task: str
    rows: str
    score: str
    scores: Sequence[Score]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "task": self.task,
            "rows": self.rows,
            "score": self.score,
            "scores": [vars(each) for each in self.scores],
        }

    def text(self) -> str:
        """A table, and what to know about it."""
        names = [self.score, *(name for name in self.scores[0].metrics if name != self.score)] if self.score else []
        several = len(self.scores) > 1
        heads = ["", *names, *([f"{self.score}, 95 % interval"] if self.score else [])]
        heads += ["against the first", "95 % interval"] if several else []
        lines = []
        for each in self.scores:
            cells = [each.name, *(f"{each.metrics[name]:.4f}" if name in each.metrics else "" for name in names)]
            cells += [span(each.interval)] if self.score else []
            cells += ["" if each.gap is None else f"{each.gap:+.4f}", span(each.gap_interval)] if several else []
            lines.append(cells)
        notes = dict.fromkeys(note for each in self.scores for note in each.notes)
        return "\n".join([plain(heads, lines), "", f"{self.task}: {self.rows}", *notes])


def evaluate(sources: Sequence[str | Path], settings: Sequence[str] = (), file: str | None = None) -> Evaluated:
    """Score each of `sources` on the rows that its task holds out, or on all rows of `file`.

    They are loaded one after another.

    Raises:
        InputError: sources of tasks that do not have the same rows or classes, and what `Ready.of` and a run refuse.
    """
    if file is not None and not Path(file).expanduser().is_file():
        raise InputError(f"{file}: there is no such file{similar(Path(file).expanduser())}")
    for source in sources:  # before the first of them is loaded
        config_of(source, settings, file or "")
    scores: list[Score] = []
    first: _Scored | None = None
    for source in sources:
        found = _scored(source, settings, file)
        first = first or found
        if (found.labels, found.main, found.content) != (first.labels, first.main, first.content):
            raise InputError(
                f"{source}: has other rows, classes or metrics than {sources[0]}: give both the same ones, --in FILE"
            )
        answers, reference = found.answers, first.answers
        alone = interval(found.main, [answers]) if answers else None
        gap, both = None, None
        if scores and found.main in found.metrics:
            gap = found.metrics[found.main] - scores[0].metrics[found.main]
            both = interval(found.main, [answers], [reference]) if answers and reference else None
        scores.append(Score(str(source), found.metrics, alone, gap, both, found.notes))
        gc.collect()
        torch.cuda.empty_cache()
    assert first is not None
    return Evaluated(first.label, first.rows, first.main, scores)


@dataclass(frozen=True)
class _Scored:
    """Of one source; `main` is the main metric of the first split, `content` what is read and learnt of the rows."""

    label: str
    rows: str
    labels: tuple[str, ...]
    main: str
    content: Any
    metrics: Mapping[str, float]
    answers: Predictions | None
    notes: Sequence[str]


def _scored(source: str | Path, settings: Sequence[str], file: str | None) -> _Scored:
    """As a run scores its adapter: the same rows in the same batches."""
    ready = Ready.of(source, settings, file or "")
    task, config = ready.task, ready.config
    splits = [subset(split, config.eval_rows) for split in task.evaluation()] if file is None else [task.own_rows(file)]
    metrics: dict[str, float] = {}
    found = []
    for split in splits:
        found.append(ready.score(ready.encoded(split), final=True))
        metrics |= found[-1].metrics
    rows = found[0].rows
    words = [f"{len(split.data):,} rows of {split.name}{f' ({split.note})' if split.note else ''}" for split in splits]
    return _Scored(
        label=task.label,
        rows=", ".join(words) if file is None else f"{len(splits[0].data):,} rows of {file}",
        labels=tuple(task.labels),
        main=f"{task.main}{splits[0].suffix}" if task.main else "",
        content=[_content(split, task) for split in splits],
        metrics=metrics,
        answers=Predictions.of(rows.to_pydict()) if task.main and rows.num_rows else None,
        notes=[note for each in found for note in each.notes],
    )


def _content(split: Split, task: Task) -> list[Any]:
    columns = [name for name in (*task.text, task.target, REFERENCES) if name in split.data.column_names]
    return [split.data[name][:] for name in columns]
