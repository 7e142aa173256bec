"""What a set of runs says, in plain sentences and plain tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rankwise.metrics import METRICS, Metric
from rankwise.metrics.metric import CORRELATION, Interval, mean_of_sums
from rankwise.results.predictions import predictions
from rankwise.results.stats import (
    Difference,
    corrected,
    difference,
    equal,
    mean,
    paired_bootstrap,
    sd,
    t_interval,
)
from rankwise.results.tables import Average, Row, averages, best, plain, summarise, unofficial
from rankwise.runs.answers import listed, shown
from rankwise.runs.search import Search, in_words

COLUMNS = (
    "budget, peak, final: trainable parameters of the size given, most at once, kept at the end; head: those of the\n"
    "classifier, in none of the others. Memory, time and speed are means over the seeds of the rate shown."
)
OF_BUDGET = "of budget: the peak as a share of what the experiment's `budget` allows every method."
WELL_USED = 0.9
"""A share of the budget below which a method may be behind for being smaller."""


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
        examples = span(found.examples) if found.examples is not None else "none"
        low, high = found.seeds
        over = (
            f"{span(found.seeds)} over {found.n} seeds"
            if high > low
            else f"none over {found.n} seeds with the same gap"
        )
        intervals = [over, f"{examples} over the examples"]
        return f"{text} (95 % intervals: {', '.join(intervals)}): {verdict(found)}."


def verdict(found: Difference) -> str:
    """What may be said of a difference, in words."""
    if not found.alone:
        words = f"{found.n} seeds cannot tell these two apart; that does not mean they are equal"
        return f"{words}: a gap that is the same at so few seeds has no spread to judge by" if found.clear else words
    if found.comparisons == 1:
        return f"a difference at n = {found.n}"
    if not found.shown:
        return (
            f"with {found.n} seeds this gap would count if it were the only comparison; there are {found.comparisons}, "
            "so it is not certain: add seeds"
        )
    return f"a difference at n = {found.n}, also after Holm's correction over {found.comparisons} comparisons"


@dataclass(frozen=True)
class Summary:
    """All rows, the best of each task and method, and the contrasts between the methods.

    `reference` is the method that the others are measured against: its name, and the options that tell it from others;
    `left_out` says what is not in here that might be looked for.
    """

    rows: list[Row]
    best: list[Row]
    contrasts: list[Contrast]
    reference: Mapping[str, Any]
    left_out: str

    @classmethod
    def of(
        cls,
        results: Sequence[dict[str, Any]],
        reference: Mapping[str, Any] | None = None,
        left_out: str = "",
    ) -> "Summary":
        """Of what `Store.results` and `Store.left_out` give. Without a `reference` it is plain LoRA."""
        reference = reference or {"name": "lora"}
        rows = summarise(results)
        chosen = best(rows)
        contrasts = []
        for row in chosen:
            other = _other(row, [other for other in chosen if other["setting"] == row["setting"]], reference)
            found = difference(row["scores"], other["scores"]) if other else None
            if other and found:
                examples = _bootstrap(row, other)
                contrasts.append(Contrast(row, other, replace(found, examples=examples)))
        after = corrected([each.found for each in contrasts])
        contrasts = [replace(each, found=new) for each, new in zip(contrasts, after, strict=True)]
        return cls(rows, chosen, contrasts, reference, left_out)

    def findings(self) -> list[str]:
        """How the methods differ, a sentence each."""
        return [contrast.sentence() for contrast in self.contrasts]

    def notes(self) -> list[str]:
        """What a reader has to know before quoting a number."""
        notes = [self.left_out] if self.left_out else []
        open_to_choice = [row for row in self.rows if row["tuned"] is None]
        if len(open_to_choice) > len([row for row in self.best if row["tuned"] is None]):
            notes.append(
                "Rates were chosen on the rows reported, so scores are slightly too high; use `tune:` to avoid this."
            )
        for task in dict.fromkeys(row["task"] for row in self.best):
            several = len({row["method"] for row in self.best if row["task"] == task}) > 1
            if several and not any(each.ours["task"] == task for each in self.contrasts):
                notes.append(
                    f"{task}: nothing is compared, for no {_spelled(self.reference)} stands beside these under the "
                    "same settings; report.reference of an experiment names another method."
                )
        for row in self.best:
            notes += [*_of_tuning(row), *_of_budget(row), *_of_search(row)]
        unsized = [row["method"] for row in self.best if row["asked"] is None]
        if unsized and len(unsized) < len(self.best):
            names = ", ".join(dict.fromkeys(unsized))
            notes.append(f"Outside of the budget, for no budget was set or there is no size to choose: {names}.")
        for row in self.best:
            for split, why in unofficial(row).items():
                notes.append(f"{row['task']} *: {split} is not the official split: {why}")
            if row["train_own"] and row["train_note"]:
                notes.append(f"{row['task']}: trained on rows of {row['train_own']} ({row['train_note']})")
            notes += [f"{row['task']}: {remark}" for remark in row["remarks"]]
        return list(dict.fromkeys(note if note.endswith(".") else f"{note}." for note in notes))

    def text(self) -> str:
        """Tables of scores and of costs, the findings and the notes, for a terminal."""
        parts = []
        for task in dict.fromkeys(row["task"] for row in self.best):
            rows = [row for row in self.best if row["task"] == task]
            mark = " *" if unofficial(rows[0]) else ""
            head = f"{task}{mark}: {scored_on(rows[0])}"
            parts.append("; ".join(filter(None, [head, always(rows)])))
            parts.append(_scores(rows))
            parts += [plain(*table) for table in tried(rows)]
            parts.append(_costs(rows))
        if found := averages(self.best):
            parts.append(_averages(found))
        if self.best:
            budgets = any(row["asked"] for row in self.best)
            parts.append(f"{COLUMNS}\n{OF_BUDGET}" if budgets else COLUMNS)
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
                    "alone": each.found.alone,
                    "shown": each.found.shown,
                    "verdict": "one seed shows nothing" if each.found.seeds is None else verdict(each.found),
                }
                for each in self.contrasts
            ],
            "findings": self.findings(),
            "notes": self.notes(),
        }


def span(interval: Interval | None) -> str:
    """An interval as `0.712 … 0.790`."""
    return "" if interval is None else f"{interval[0]:.3f} … {interval[1]:.3f}"


def interval(found: Interval | None, seeds: int) -> str:
    """The interval over so many seeds, or why there is none: one says nothing, and neither do equal ones."""
    if found is not None or seeds < 2:
        return span(found)
    return "equal at both seeds" if seeds == 2 else f"equal at all {seeds} seeds"


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


def always(rows: Sequence[Row]) -> str:
    """`answering 'function' always scores 0.610`, of one task; "" where there is no class to answer."""
    found = next((row["always"] for row in rows if row["always"]), None)
    if not found:
        return ""
    tied = found.get("tied", ())
    names = f"any of the commonest classes, {listed([found['class'], *tied])}," if tied else shown(found["class"])
    return f"answering {names} always scores {found['score']:.3f}"


def scored_on(row: Row) -> str:
    """Which metric, on which rows: `accuracy on 480 rows of validation`."""
    if not row["own"]:
        return f"{row['score'] or 'not scored'} on {row['rows']:,} rows of {row['split']}"
    note = f" ({row['note']})" if row["note"] else ""
    score = f"{row['score']}, scored" if row["score"] else "answered, not scored,"
    return f"{score} on {row['rows']:,} rows of {row['own']}{note}"


def chosen_on(row: Row) -> str:
    """On what the learning rate of a tuned row was chosen, in a sentence."""
    found = row["tuned"]
    note = f" ({found['note']})" if found["note"] else ""
    return (
        f"{row['task']}: learning rates were chosen on {found['rows']} rows of {found['split']}{note}; the "
        f"{row['rows']} rows of {row['split']} were scored once, at the end."
    )


def _of_tuning(row: Row) -> list[str]:
    """On what the rate of a row was chosen, and whether it lies at the edge of what was tried."""
    found = row["tuned"]
    if found is None:
        return []
    if found["learning_rate"] != row["learning_rate"]:
        return [
            f"{row['task']}, {row['method']}: the rate shown, {row['learning_rate']:g}, is not the one that tuning "
            f"chose, {found['learning_rate']:g}: carry out the experiment to its end, in another folder if `tune` has "
            "changed."
        ]
    chosen = chosen_on(row)
    if found["tied"]:
        others = " and ".join(f"{rate:g}" for rate in found["tied"])
        where = f"the rate chosen, {found['learning_rate']:g}, is the lowest of equals: {others} scored the same."
        return [chosen, f"{row['task']}, {row['method']}: {where}"]
    if not found["edge"]:
        return [chosen]
    beyond = "lower" if found["edge"] == "lowest" else "higher"
    return [
        chosen,
        f"{row['task']}, {row['method']}: the rate chosen, {found['learning_rate']:g}, is the {found['edge']} of those "
        f"that trained to their end; unless {beyond} ones diverged, one might do better.",
    ]


def _of_budget(row: Row) -> list[str]:
    if row["used"] is None or WELL_USED <= row["used"] <= 1:
        return []
    what = f"{row['task']}, {row['method']}: {row['used']:.0%} of the budget of {row['asked']:,} parameters"
    if row["used"] > 1:
        return [f"{what}, for its ranks grew beyond those it began with."]
    return [f"{what} are used: it is compared with less than it was allowed."]


def _of_search(row: Row) -> list[str]:
    """What the searches for ranks have come to."""
    found = {seed: Search(**each) for seed, each in row["searches"].items()}
    return [f"{row['task']}, {row['method']}: {in_words(found)}"] if found else []


def tried(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """Every rate that was tried for `rows` of one task, with what it scored; a table for each set of rows to choose by.

    Header and lines, of method, rate, seeds, score, and "chosen" or "".
    """
    tables: dict[str, tuple[list[str], list[list[str]]]] = {}
    for row in rows:
        if (found := row["tuned"]) is None:
            continue
        header = ["method", "rate tried", "seeds", f"{found['score']} on {found['split']}", ""]
        _, lines = tables.setdefault(f"{found['split']} {found['rows']}", (header, []))
        for each in found["rates"]:
            chosen = "chosen" if each["learning_rate"] == found["learning_rate"] else ""
            worth = plus_minus(each["mean"], each["sd"])
            lines.append([row["method"], f"{each['learning_rate']:g}", str(each["n"]), worth, chosen])
    return list(tables.values())


def _scores(rows: Sequence[Row]) -> str:
    header = ["method", "learning rate", "seeds", "mean ± sd", "95 % interval", "budget", "peak", "final", "head"]
    if asked := any(row["asked"] for row in rows):
        header.append("of budget")
    others = [name for name in rows[0]["metrics"] if name != rows[0]["score"]]
    return plain(
        [*header[:5], *others, *header[5:]],
        [
            [
                row["method"],
                f"{row['learning_rate']:g}",
                str(row["n"]),
                plus_minus(row["mean"], row["sd"]),
                interval(row["interval"], row["n"]),
                *(plus_minus(row["metrics"][name]["mean"], row["metrics"][name]["sd"]) for name in others),
                *(f"{row[key]:,}" for key in ("budget", "trainable", "final", "head")),
                *([f"{row['used']:.1%}" if row["used"] is not None else "outside"] if asked else []),
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
                [row.method, str(len(values)), plus_minus(mean(values), sd(values)), interval(found, len(values))]
                for row in rows
                if (values := list(row.scores.values()))
                for found in [None if equal(values) else t_interval(values, CORRELATION)]
            ],
        )
        head = f"{benchmark}, average over {len(rows[0].tasks)} tasks ({', '.join(rows[0].tasks)})"
        if rows[0].always is not None:
            head = f"{head}; answering the commonest class of each always scores {rows[0].always:.3f}"
        parts.append(f"{head}\n\n{table}")
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


def _other(row: Row, rows: Sequence[Row], reference: Mapping[str, Any]) -> Row | None:
    """What to measure `row` against: the reference at the nearest size (the best one for a head alone).

    Where warm-ups are compared too, and are no method's own, it is one of the same.
    """
    found = [other for other in rows if _is(reference, other)]
    found = [other for other in found if other["warmup"] == row["warmup"]] or found
    if _is(reference, row) or not found:
        return None
    if row["name"] == "head":
        return max(found, key=lambda other: other["mean"] if other["mean"] is not None else float("-inf"))
    return min(found, key=lambda other: abs(other["budget"] - row["budget"]))


def _is(reference: Mapping[str, Any], row: Row) -> bool:
    return all(({**row["options"], "name": row["name"]}).get(key) == value for key, value in reference.items())


def _spelled(reference: Mapping[str, Any]) -> str:
    return " ".join([str(reference["name"]), *(f"{key}={reference[key]}" for key in reference if key != "name")])


def _bootstrap(ours: Row, theirs: Row) -> Interval | None:
    """The interval over examples; None where a prediction is missing or other rows were scored."""
    seeds = sorted(ours["scores"].keys() & theirs["scores"].keys())
    found = [predictions(row["folders"][seed]) for row in (ours, theirs) for seed in seeds]
    given = [each for each in found if each is not None]
    if len(given) < len(found) or not given:
        return None
    kind, guess, labels = given[0]
    if not all(
        each.kind == kind and each.values.shape == guess.shape and np.array_equal(labels, each.labels) for each in given
    ):
        return None
    metric = METRICS.get(ours["score"], Metric())
    score, statistics = metric.value if metric.of_any_sum else None, metric.statistics
    if kind == "score":  # whose mean is the metric
        counted = [np.stack([each.values, np.ones(len(labels))], axis=1) for each in given]
        score = mean_of_sums
    elif kind == "statistics":
        counted = [each.values for each in given]
    elif statistics is not None:
        counted = [statistics(each.values, labels) for each in given]
    else:
        return None
    return score and paired_bootstrap(score, counted[: len(seeds)], counted[len(seeds) :])


def _public(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("folders", "setting")}
