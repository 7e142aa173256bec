"""A section for every run: its settings, result, curves, ranks, and some of its answers, or why it failed.

A report may hold a thousand of them, so a section is a few kilobytes: curves are drawn here, as SVG of one line, and
not by matplotlib, whose smallest picture has twenty.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.errors import InputError
from rankwise.pictures import heat
from rankwise.report import examples, figures
from rankwise.report.answers import Answered, answered
from rankwise.results.formats import duration, size, word
from rankwise.results.rows import Row
from rankwise.runs import record
from rankwise.runs.result import Finished, Split
from rankwise.runs.store import Store
from rankwise.settings import PLACE

ERROR = 3000
"""Characters of an error that are shown: its end, which names the cause."""
WIDTH, HEIGHT = 300, 70
"""Of a curve, in the units of its SVG."""


@dataclass(frozen=True)
class Curve:
    """A line through a box of WIDTH by HEIGHT, and the values at its ends."""

    name: str
    points: str
    low: str
    high: str
    steps: str


@dataclass(frozen=True)
class Ranks:
    """Final ranks by projection and layer: rows of (rank, shade from 0 to 8); the rank is "" where there is no site."""

    words: str
    layers: list[str]
    rows: list[tuple[str, list[tuple[str, int]]]]


@dataclass(frozen=True)
class Page:
    """What the page has of one run. `anchor` is its address within the page."""

    anchor: str
    label: str
    state: str
    result: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    settings: str = ""
    curves: list[Curve] = field(default_factory=list)
    ranks: Ranks | None = None
    answers: str = ""
    written: list[examples.Example] = field(default_factory=list)
    error: str = ""
    answered: Answered | None = None
    nothing: str = ""
    """A sentence if all rows got the same answer; "" if not."""


def anchor(folder: Path) -> str:
    """The address of a run within the page, whatever its folder is called."""
    return f"run-{hashlib.sha256(folder.name.encode(errors='replace')).hexdigest()[:10]}"


def pages(store: Store, folders: Sequence[Path], results: Sequence[Finished], rows: Sequence[Row]) -> list[Page]:
    """One for each of `folders`, in the order of the tables, then those that tried rates, then those without a result.

    Args:
        results: of the finished runs, as `Store.results` gives them.
        rows: the same averaged over seeds, as `summarise` gives them.
    """
    by_folder = {result.folder: result for result in results}
    finished = {folder: row.method for row in rows for folder in row.folders.values()}
    tries = {folder: each.method for folder, each in by_folder.items() if folder not in finished}
    done = [_finished(by_folder[folder], method) for folder, method in (finished | tries).items()]
    return [*done, *(_unfinished(store, folder) for folder in folders if folder not in by_folder)]


def _label(task: str, method: str, config: Mapping[str, Any]) -> str:
    label = f"{task}, {method}, rate {config['learning_rate']:g}, seed {config['seed']}"
    return label if config.get("tuning") is None else f"{label}, to choose a rate"


def _finished(result: Finished, method: str) -> Page:
    folder, lines = result.folder, record.course(result.folder)
    score = result.metrics.get(result.score)
    wanted: list[tuple[str, figures.Value]] = [
        ("training loss", figures.loss),
        ("evaluation loss", figures.evaluated("loss")),
        (result.score, figures.evaluated(result.score)),
    ]
    shown = answered(folder, result.splits.evaluation[0].name)
    facts = [
        *((name, _number(value)) for name, value in result.metrics.items()),
        *((f"{name} parameters", _number(value)) for name, value in vars(result.parameters).items()),
        *([("search", str(result.search))] if result.search else []),
        ("time", duration(result.cost.seconds)),
        ("peak memory", size(result.cost.peak_memory_bytes)),
        ("adapter on disk", size(result.cost.adapter_bytes)),
        ("trained on", _split(result.splits.train)),
        *(("scored on", _split(split)) for split in result.splits.evaluation),
    ]
    return Page(
        anchor(folder),
        _label(result.task, method, result.config),
        "done",
        "" if score is None else f"{result.score} {_number(score)}",
        facts,
        _settings(result.config),
        [found for name, value in wanted if (found := _curve(name, *figures.curve(lines, value)))],
        _ranks(folder),
        "" if shown else examples.missed(folder),
        examples.of_run(folder),
        answered=shown,
        nothing="; ".join(f"{each.split}: {each.nothing_learnt}" for each in result.answers if each.nothing_learnt),
    )


def _unfinished(store: Store, folder: Path) -> Page:
    standing = store.standing(folder)
    try:
        config = store.config(folder)
        content = config.model_dump(mode="json", exclude={*PLACE, "tuned"})
        label, settings = _label(config.task["name"], config.method["name"], content), _settings(content)
    except InputError:
        label, settings = folder.name, ""
    error = ""
    if standing.state == "failed":
        error = "\n".join(record.error_lines(folder))
        error = error if len(error) <= ERROR else f"{standing.error}\n…\n{error[-ERROR:]}"
    reached = standing.error or (f"step {standing.step} of {standing.steps}" if standing.steps else "")
    curve = _curve("training loss", *figures.curve(record.course(folder), figures.loss))
    return Page(
        anchor(folder),
        label,
        standing.state,
        reached,
        settings=settings,
        curves=[curve] if curve else [],
        error=error,
    )


def _curve(name: str, steps: Sequence[float], values: Sequence[float]) -> Curve | None:
    if len(steps) < 2:
        return None
    low, high = min(values), max(values)
    across = WIDTH / ((steps[-1] - steps[0]) or 1)
    heights = [HEIGHT * (high - value) / (high - low) if high > low else HEIGHT / 2 for value in values]
    points = " ".join(f"{(step - steps[0]) * across:.0f},{up:.0f}" for step, up in zip(steps, heights, strict=True))
    return Curve(name, points, f"{low:.3g}", f"{high:.3g}", f"steps {steps[0]:g} to {steps[-1]:g}")


def _ranks(folder: Path) -> Ranks | None:
    """The ranks at the end; None if none has changed."""
    course = figures.changes(figures.history(folder))
    if len(course) < 2:
        return None
    rows, layers, grid = heat.rank_grid(course[-1][1])
    top = max(1.0, np.nanmax(grid))
    cells = [[("", 0) if np.isnan(rank) else (f"{rank:.0f}", round(8 * rank / top)) for rank in line] for line in grid]
    return Ranks(
        figures.in_words(course), [heat.layer_name(each) for each in layers], list(zip(rows, cells, strict=True))
    )


def _settings(config: Mapping[str, Any]) -> str:
    """All settings in one line; the table of the configuration shows what they share."""
    return " · ".join(f"{key}: {word(value)}" for key, value in config.items() if value is not None)


def _split(split: Split) -> str:
    rows = f"{split.rows:,} rows of {split.name}"
    return f"{rows} ({split.note})" if split.note else rows


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
