"""What a set of runs says, in plain sentences and plain tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rankwise.runs.stats import Difference, Interval, difference, mean, paired_bootstrap, sd, t_interval
from rankwise.runs.store import answers
from rankwise.runs.tables import Average, Row, averages, best, plain, summarise, unofficial

Metrics = Mapping[str, Callable[[np.ndarray, np.ndarray], float]]
"""Metric name -> function of (predictions (n,), labels (n,))."""

COLUMNS = (
    "budget, peak, final: trainable adapter parameters allowed, most at once, and kept at the end; head: those of the\n"
    "classifier, in none of the others. Memory, time and speed are means over the seeds of the rate shown."
)


@dataclass(frozen=True)
class Contrast:
    """One method against another on one task, each at its best learning rate."""

    ours: Row
    theirs: Row
    found: Difference

    def sentence(self) -> str:
        """The contrast in words: the size of the difference, its intervals, and whether it counts."""
        ours, theirs, found = self.ours["method"], self.theirs["method"], self.found
        where = f"{self.ours['task']}, {self.ours['score']}"
        if ours == "head":
            way = "behind" if found.mean <= 0 else "ahead of"
            text = f"{where}: training the head only is {abs(found.mean):.3f} {way} {theirs}"
        else:
            text = f"{where}: {ours} against {theirs}: {found.mean:+.3f}"
        if found.seeds is None:
            return f"{text}. One seed shows nothing; use three at least."
        intervals = [f"{span(found.seeds)} over {found.n} seeds"]
        if found.examples is not None:
            intervals.append(f"{span(found.examples)} over the examples")
        verdict = "a difference" if found.shown else "no difference shown"
        return f"{text} (95 % intervals: {', '.join(intervals)}): {verdict} at n = {found.n}."


@dataclass(frozen=True)
class Summary:
    """All rows, the best of each task and method, and the contrasts between the methods."""

    rows: list[Row]
    best: list[Row]
    contrasts: list[Contrast]

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]], metrics: Metrics) -> "Summary":
        """Of what `Store.results` gives; `metrics` are for the bootstrap over examples, {} does without."""
        rows = summarise(results)
        chosen = best(rows)
        contrasts = []
        for row in chosen:
            reference = _reference(row, [other for other in chosen if other["task"] == row["task"]])
            found = difference(row["scores"], reference["scores"]) if reference else None
            if reference and found:
                contrasts.append(Contrast(row, reference, replace(found, examples=_bootstrap(row, reference, metrics))))
        return cls(rows, chosen, contrasts)

    def findings(self) -> list[str]:
        """How the methods differ, a sentence each."""
        return [contrast.sentence() for contrast in self.contrasts]

    def notes(self) -> list[str]:
        """What a reader has to know before quoting a number."""
        notes = []
        if len(self.rows) > len(self.best):
            notes.append(
                "The learning rate of each method is the one with the best mean on the evaluation split, which is also "
                "the split reported: every score is a little too high."
            )
        for row in self.best:
            for split, why in unofficial(row).items():
                text = f"{row['task']} *: {split} is not the official split: {why}"
                notes.append(text if text.endswith(".") else f"{text}.")
            notes += [f"{row['task']}: {remark}" for remark in row["remarks"]]
        return list(dict.fromkeys(notes))

    def text(self) -> str:
        """Tables of scores and of costs, the findings and the notes, for a terminal."""
        parts = []
        for task in dict.fromkeys(row["task"] for row in self.best):
            rows = [row for row in self.best if row["task"] == task]
            mark = " *" if unofficial(rows[0]) else ""
            parts.append(f"{task}{mark}: {rows[0]['score']} on {rows[0]['rows']} rows of {rows[0]['split']}")
            parts.append(_scores(rows))
            parts.append(_costs(rows))
        if found := averages(self.best):
            parts.append(_averages(found))
        if self.best:
            parts.append(COLUMNS)
        for sentences in (self.findings(), self.notes()):
            if sentences:
                parts.append("\n".join(sentences))
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "rows": [_public(row) for row in self.rows],
            "best": [_public(row) for row in self.best],
            "averages": [asdict(each) for each in averages(self.best)],
            "differences": [
                {
                    "task": each.ours["task"],
                    "method": each.ours["method"],
                    "reference": each.theirs["method"],
                    **asdict(each.found),
                    "shown": each.found.shown,
                }
                for each in self.contrasts
            ],
            "findings": self.findings(),
            "notes": self.notes(),
        }


def span(interval: Interval | None) -> str:
    """An interval as `0.712 … 0.790`."""
    return "" if interval is None else f"{interval[0]:.3f} … {interval[1]:.3f}"


def plus_minus(middle: float | None, spread: float | None) -> str:
    """`0.751 ± 0.012`, or the mean alone for one seed."""
    if middle is None:
        return ""
    return f"{middle:.3f}" if spread is None else f"{middle:.3f} ± {spread:.3f}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scores(rows: Sequence[Row]) -> str:
    header = ["method", "learning rate", "seeds", "mean ± sd", "95 % interval", "budget", "peak", "final", "head"]
    others = [name for name in rows[0]["metrics"] if name != rows[0]["score"]]
    return plain(
        [*header[:5], *others, *header[5:]],
        [
            [
                row["method"],
                f"{row['learning_rate']:g}",
                str(row["n"]),
                plus_minus(row["mean"], row["sd"]),
                span(row["interval"]),
                *(plus_minus(row["metrics"][name]["mean"], row["metrics"][name]["sd"]) for name in others),
                *(f"{row[key]:,}" for key in ("budget", "trainable", "final", "head")),
            ]
            for row in rows
        ],
    )


def _averages(found: Sequence[Average]) -> str:
    """A line per method and what the average is over, for it may be a part of the benchmark."""
    parts = []
    for benchmark in dict.fromkeys(each.benchmark for each in found):
        rows = [each for each in found if each.benchmark == benchmark]
        table = plain(
            ["method", "seeds", "mean ± sd", "95 % interval"],
            [
                [row.method, str(len(values)), plus_minus(mean(values), sd(values)), span(t_interval(values))]
                for row in rows
                if (values := list(row.scores.values()))
            ],
        )
        parts.append(f"{benchmark}, average over {len(rows[0].tasks)} tasks ({', '.join(rows[0].tasks)})\n\n{table}")
    return "\n\n".join(parts)


def _costs(rows: Sequence[Row]) -> str:
    return plain(
        ["method", "peak memory", "time of a run", "examples/s", "adapter on disk"],
        [
            [
                row["method"],
                size(row["peak_memory"]),
                duration(row["seconds"]),
                f"{row['examples_per_second']:.1f}",
                size(row["adapter_bytes"]),
            ]
            for row in rows
        ],
    )


def _reference(row: Row, rows: Sequence[Row]) -> Row | None:
    """What to measure `row` against: plain LoRA, at the nearest budget (the best one for a head alone)."""
    plain_lora = [other for other in rows if other["name"] == "lora"]
    if row["name"] == "lora" or not plain_lora:
        return None
    if row["name"] == "head":
        return max(plain_lora, key=lambda other: other["mean"] if other["mean"] is not None else float("-inf"))
    return min(plain_lora, key=lambda other: abs(other["budget"] - row["budget"]))


def _bootstrap(ours: Row, theirs: Row, metrics: Metrics) -> Interval | None:
    """The interval over examples; None where a prediction is missing or other rows were scored."""
    seeds = sorted(ours["scores"].keys() & theirs["scores"].keys())
    found = [answers(row["folders"][seed]) for row in (ours, theirs) for seed in seeds]
    given = [each for each in found if each is not None]
    if len(given) < len(found) or not given:
        return None
    labels = given[0].labels
    if not all(np.array_equal(labels, each.labels) for each in given):
        return None
    score = _mean if given[0].scored else metrics.get(ours["score"])
    if score is None:
        return None
    guesses = [each.predictions for each in given]
    return paired_bootstrap(score, guesses[: len(seeds)], guesses[len(seeds) :], labels)


def _mean(scores: np.ndarray, _: np.ndarray) -> float:
    return float(scores.mean())


def _public(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "folders"}
