"""What a model sees of its data, in words and tables."""

from collections.abc import Sequence
from dataclasses import asdict

from rankwise.runs.data import Seen, SeenSplit

Lines = tuple[list[str], list[list[str]]]
"""The heads and the rows of a table."""


def caption(seen: Seen) -> str:
    """Whose data it is, and who reads it."""
    length = f", at most {seen.max_length:,} tokens of an input" if seen.splits[0].lengths else ""
    return f"{seen.task} as {seen.model} reads it{length}"


def by_split(splits: Sequence[SeenSplit]) -> Lines:
    """A line for each split."""
    tokens = any(each.learnt for each in splits)
    lines = [_cells(each, tokens, each is splits[0]) for each in splits]
    return [*lines[0]], [[*line.values()] for line in lines]


def _cells(each: SeenSplit, tokens: bool, first: bool) -> dict[str, str]:
    """A line of that table by its heads; `tokens`: whether tokens are learnt."""
    cells = {"split": each.split, "rows": f"{each.rows:,}"}
    if each.sizes:
        cells["sizes"] = ", ".join(f"{size} ({count:,})" for size, count in each.sizes.items())
    if each.lengths:
        heads = ("shortest", "median", "95 %", "longest")
        cells |= {head: f"{number:,}" for head, number in zip(heads, asdict(each.lengths).values(), strict=True)}
        cells |= {"rows cut": _part(each.cut, each.rows), "tokens cut": _part(each.lost, each.tokens + each.lost)}
        cells |= {"learnt": _part(each.learnt, each.tokens)} if tokens else {}
    also = "" if first else _part(each.shared, each.given)
    return {**cells, "repeated": _part(each.repeated, each.given), "also in train": also}


def by_class(splits: Sequence[SeenSplit]) -> Lines:
    """A line for each class: its rows, or its pixels, in each split."""
    names = dict.fromkeys(name for each in splits for name in each.classes)
    totals = [(each.classes, sum(each.classes.values())) for each in splits]
    lines = [[name, *(_part(classes.get(name, 0), total) for classes, total in totals)] for name in names]
    return ["class" if splits[0].lengths else "pixels of", *(each.split for each in splits)], lines


def _part(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count else "0"


def remarks(split: SeenSplit) -> list[str]:
    """What may be wrong with the rows of a split, a sentence each."""
    found = {
        split.dropped: "rows of {} have nothing to learn in what the model reads, and are left out",
        split.nothing: "rows of {} have no token that is learnt",
        split.contradicted: "rows of {} have the input of another row, but another class",
    }
    lines = [f"{count:,} {words.format(split.split)}" for count, words in found.items() if count]
    if split.rows != split.given - split.dropped:
        lines.append(f"{split.given:,} rows of {split.split} follow one another in {split.rows:,} blocks")
    return lines
