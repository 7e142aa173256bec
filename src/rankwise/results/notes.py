"""What a reader has to know before quoting a number, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.metrics import with_direction, worth
from rankwise.results.contrasts import Contrast, spelled
from rankwise.results.rows import Row, unofficial
from rankwise.runs.answers import listed, shown
from rankwise.runs.search import in_words

WELL_USED = 0.9
"""The share of the budget below which a note says that a method may score lower because it is smaller."""


def notes(
    rows: Sequence[Row], best: Sequence[Row], contrasts: Sequence[Contrast], reference: Mapping[str, Any]
) -> list[str]:
    """Notes on rates, on methods that could not be compared, on budgets, and on each of the best rows."""
    lines = []
    if len([row for row in rows if row.tuned is None]) > len([row for row in best if row.tuned is None]):
        ways = {"too high" if worth(row.score, 1) > 0 else "too low" for row in best}
        how = ways.pop() if len(ways) == 1 else "too good"
        lines.append(f"Rates were chosen on the rows reported, so scores are slightly {how}; use `tune:` to avoid this")
    for task in dict.fromkeys(row.task for row in best):
        several = len({row.method for row in best if row.task == task}) > 1
        if several and not any(each.ours.task == task for each in contrasts):
            lines.append(
                f"{task}: nothing is compared, because no {spelled(reference)} ran with the same "
                "settings; report.reference in an experiment names another method"
            )
    for row in best:
        lines += [*_of_tuning(row), *_of_budget(row), *_of_search(row)]
    unsized = [row.method for row in best if row.asked is None and row.trains]
    if unsized and any(row.asked for row in best):
        names = ", ".join(dict.fromkeys(unsized))
        lines.append(f"Outside the budget, because none was set or the method has no size to choose: {names}")
    for row in best:
        lines += [f"{row.task} *: {split} is not the official split: {why}" for split, why in unofficial(row).items()]
        lines += [*_of_own_rows(row), *_of_runs(row)]
    return list(dict.fromkeys(map(_ended, lines)))


def footnotes(rows: Sequence[Row]) -> list[str]:
    """The notes below a table on its own: where its rows come from, how rates were chosen, what was not learnt."""
    lines = [f"{row.task}: {scored_on(row)}" for row in rows if row.evaluated.own]
    for row in rows:
        lines += [*_of_own_rows(row), *([chosen_on(row)] if row.tuned else []), *_of_search(row), *_of_runs(row)]
    lines += [f"* {row.task}, {split}: {why}" for row in rows for split, why in unofficial(row).items()]
    return list(dict.fromkeys(lines))


def remarks(row: Row) -> list[str]:
    """The notes on the search and the runs of a row."""
    return [_ended(note) for note in (*_of_search(row), *_of_runs(row))]


def always(rows: Sequence[Row]) -> str:
    """`always answering 'function' scores 0.610`, of one task; "" if there are no classes."""
    one = next((row.always for row in rows if row.always), None)
    if not one:
        return ""
    names = f"one of the most frequent classes ({listed([one.answer, *one.tied])})" if one.tied else None
    return f"always answering {names or shown(one.answer)} scores {one.score:.3f}"


def scored_on(row: Row) -> str:
    """Which metric, on which rows: `accuracy on 480 rows of validation`."""
    split = row.evaluated
    if not split.own:
        return f"{with_direction(row.score) or 'not scored'} on {split.rows:,} rows of {split.name}"
    note = f" ({split.note})" if split.note else ""
    score = f"{with_direction(row.score)}, scored" if row.score else "answered, not scored,"
    return f"{score} on {split.rows:,} rows of {split.own}{note}"


def chosen_on(row: Row) -> str:
    """On what the learning rate of a tuned row was chosen, in a sentence."""
    assert row.tuned is not None
    split = row.tuned.split
    note = f" ({split.note})" if split.note else ""
    return (
        f"{row.task}: learning rates were chosen on {split.rows:,} rows of {split.name}{note}; the "
        f"{row.evaluated.rows:,} rows of {row.evaluated.name} were scored once, at the end."
    )


def _of_tuning(row: Row) -> list[str]:
    """On what the rate of a row was chosen, and whether it lies at the edge of what was tried."""
    tuned = row.tuned
    if tuned is None:
        return []
    if tuned.learning_rate != row.learning_rate:
        return [
            f"{row.task}, {row.method}: the rate shown, {row.learning_rate:g}, is not the one that tuning "
            f"chose, {tuned.learning_rate:g}: run the experiment to its end, in another folder if `tune` has "
            "changed"
        ]
    what = f"{row.task}, {row.method}: the rate chosen, {tuned.learning_rate:g}, is the"
    if tuned.tied:
        others = " and ".join(f"{rate:g}" for rate in tuned.tied)
        return [chosen_on(row), f"{what} lowest of equals: {others} scored the same"]
    if not tuned.edge:
        return [chosen_on(row)]
    beyond = "lower" if tuned.edge == "lowest" else "higher"
    return [
        chosen_on(row),
        f"{what} {tuned.edge} of those that trained to their end; unless {beyond} ones diverged, one might do better",
    ]


def _of_budget(row: Row) -> list[str]:
    if row.used is None or WELL_USED <= row.used <= 1:
        return []
    what = f"{row.task}, {row.method}: {row.used:.0%} of the budget of {row.asked:,} parameters"
    if row.used > 1:
        return [f"{what}, because its ranks grew beyond those it started with"]
    return [f"{what} are used: a worse score may come from its smaller size"]


def _of_search(row: Row) -> list[str]:
    """The outcome of the searches for ranks."""
    return [f"{row.task}, {row.method}: {in_words(row.searches)}"] if row.searches else []


def _of_own_rows(row: Row) -> list[str]:
    """What there is to know of the user's own training rows."""
    trained = row.trained
    return [f"{row.task}: trained on rows of {trained.own} ({trained.note})"] if trained.own and trained.note else []


def _of_runs(row: Row) -> list[str]:
    return [f"{row.task}: {remark}" for remark in row.remarks]


def _ended(note: str) -> str:
    return note if note.endswith(".") else f"{note}."
