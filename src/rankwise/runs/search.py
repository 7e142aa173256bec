"""What searches for ranks have found, in words. One that has changed nothing says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.runs.kinds import Amount, Count, Text


@dataclass(frozen=True)
class Search:
    """What one search for ranks has found, as `result.json` keeps it under `search`.

    Attributes:
        changed: how many sites end with another rank than at the start.
        sites: how many sites there are.
        moved: how far the farthest of the weights that decide the ranks moved; None if unknown.
        weights: what those weights are called, such as ω.
        unit: what `moved` counts, such as ranks; empty for a plain number.
        advice: what to change if the search has found nothing.
    """

    changed: Count
    sites: Count
    moved: Amount | None = None
    weights: Text = ""
    unit: Text = ""
    advice: Text = ""

    def __str__(self) -> str:
        return in_words({0: self})


def in_words(searches: Mapping[int, Search]) -> str:
    """A sentence about the searches of one method, by seed."""
    found = list(searches.values())
    text = f"ranks changed at {_list(each.changed for each in found)} of {found[0].sites} sites"
    if len(found) > 1:
        text += f" (seeds {_list(searches)})"
    if moved := [f"{each.moved:.2f}" for each in found if each.moved is not None]:
        text += f", and {found[0].weights} moved by up to {_list(moved)} {found[0].unit}".rstrip()
    if idle := [seed for seed, each in searches.items() if not each.changed]:
        where = "" if len(idle) == len(found) else f" at seed{'s' if len(idle) > 1 else ''} {_list(idle)}"
        text += f": the result is that of plain LoRA{where}"
    advice = dict.fromkeys(each.advice for each in found if each.advice)
    return "; ".join([text, *advice]) + "."


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
