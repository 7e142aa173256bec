"""One method against another, and what the difference shows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rankwise.metrics import with_direction, worth
from rankwise.metrics.bootstrap import interval
from rankwise.metrics.metric import Interval
from rankwise.results.formats import span
from rankwise.results.predictions import predictions
from rankwise.results.rows import Row
from rankwise.results.stats import Difference, corrected, difference

FLOORS = {"head": "training the head only", "none": "the model as it comes"}
"""Methods without an adapter that every other one should beat, in words."""


@dataclass(frozen=True)
class Contrast:
    """One method against another on one task, each at its best learning rate."""

    ours: Row
    theirs: Row
    gap: Difference

    def sentence(self) -> str:
        """The contrast in words: the size of the difference, its intervals, and whether it counts."""
        ours, theirs, gap = self.ours.method, self.theirs.method, self.gap
        where = f"{self.ours.task}, {with_direction(self.ours.score)}"
        if ours in FLOORS:
            way = "behind" if worth(self.ours.score, gap.mean) <= 0 else "ahead of"
            text = f"{where}: {FLOORS[ours]} is {abs(gap.mean):.3f} {way} {theirs}"
        else:
            text = f"{where}: {ours} against {theirs}: {gap.mean:+.3f}"
        if gap.seeds is None:
            return f"{text}. One seed shows nothing; use at least three."
        examples = span(gap.examples) if gap.examples is not None else "none"
        low, high = gap.seeds
        over = f"{span(gap.seeds)} over {gap.n} seeds" if high > low else f"none over {gap.n} seeds with the same gap"
        return f"{text} (95 % intervals: {over}, {examples} over the examples): {verdict(gap)}."

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        gap = self.gap
        return {
            "task": self.ours.task,
            "method": self.ours.method,
            "reference": self.theirs.method,
            **asdict(gap),
            "alone": gap.alone,
            "shown": gap.shown,
            "verdict": "one seed shows nothing" if gap.seeds is None else verdict(gap),
        }


def contrasts(best: Sequence[Row], reference: Mapping[str, Any]) -> list[Contrast]:
    """Each row against `reference` under the same settings, with Holm's correction over all of them.

    Args:
        best: what `rows.best` gives.
        reference: name and options of the method to measure against.
    """
    found = []
    for row in best:
        other = _other(row, [other for other in best if other.setting == row.setting], reference)
        gap = difference(row.scores, other.scores) if other else None
        if other and gap:
            found.append(Contrast(row, other, replace(gap, examples=_bootstrap(row, other))))
    after = corrected([each.gap for each in found])
    return [replace(each, gap=new) for each, new in zip(found, after, strict=True)]


def verdict(gap: Difference) -> str:
    """What a difference shows, in words."""
    if not gap.alone:
        words = f"{gap.n} seeds cannot tell these two apart; that does not mean they are equal"
        return f"{words}: a gap that is the same at so few seeds has no spread to judge by" if gap.clear else words
    if gap.comparisons == 1:
        return f"a difference at n = {gap.n}"
    if not gap.shown:
        return (
            f"with {gap.n} seeds this gap would count if it were the only comparison; there are {gap.comparisons}, "
            "so it is not certain: add seeds"
        )
    return f"a difference at n = {gap.n}, also after Holm's correction over {gap.comparisons} comparisons"


def spelled(reference: Mapping[str, Any]) -> str:
    """A method with its options, as in `lora-fa init=svd`."""
    return " ".join([str(reference["name"]), *(f"{key}={reference[key]}" for key in reference if key != "name")])


def _other(row: Row, rows: Sequence[Row], reference: Mapping[str, Any]) -> Row | None:
    """What to measure `row` against: the reference at the nearest size (the best one where no adapter trains).

    Where runs differ in warm-up too, one with the same warm-up is preferred.
    """
    others = [other for other in rows if _is(reference, other)]
    others = [other for other in others if other.warmup == row.warmup] or others
    if _is(reference, row) or not others:
        return None
    if row.name in FLOORS:
        return max(others, key=lambda other: worth(other.score, other.mean))
    return min(others, key=lambda other: abs(other.budget - row.budget))


def _is(reference: Mapping[str, Any], row: Row) -> bool:
    return all(({**row.options, "name": row.name}).get(key) == value for key, value in reference.items())


def _bootstrap(ours: Row, theirs: Row) -> Interval | None:
    """The interval over examples; None where a prediction is missing or other rows were scored."""
    seeds = sorted(ours.scores.keys() & theirs.scores.keys())
    found = [predictions(row.folders[seed]) for row in (ours, theirs) for seed in seeds]
    given = [each for each in found if each is not None]
    if len(given) < len(found) or not given:
        return None
    return interval(ours.score, given[: len(seeds)], given[len(seeds) :])
