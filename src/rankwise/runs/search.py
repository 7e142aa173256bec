"""What searches for ranks have come to, in words: one that has changed nothing says so."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Search:
    """What one search for ranks has come to, as `result.json` keeps it under `search`.

    Attributes:
        changed: how many sites have another rank than they began with.
        sites: how many there are.
        moved: how far that has gone by which ranks are decided; None where that has no measure.
        measure: what `moved` is.
        advice: what to do about it, where the search has found nothing.
    """

    changed: int
    sites: int
    moved: float | None = None
    measure: str = ""
    advice: str = ""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Search | None":
        """What a result says of it; None where the method learns no ranks."""
        kept = result.get("search")
        return (
            None if kept is None else cls(**{each.name: kept[each.name] for each in fields(cls) if each.name in kept})
        )

    def __str__(self) -> str:
        return in_words({0: self})


def in_words(searches: Mapping[int, Search]) -> str:
    """A sentence about the searches of one method, by seed."""
    found = list(searches.values())
    text = f"ranks changed at {_list(each.changed for each in found)} of {found[0].sites} sites"
    if len(found) > 1:
        text += f" at seeds {_list(searches)}"
    if moved := [f"{each.moved:.2f}" for each in found if each.moved is not None]:
        text += f", {found[0].measure} = {_list(moved)}"
    if idle := [seed for seed, each in searches.items() if not each.changed]:
        where = "" if len(idle) == len(found) else f" at seed{'s' if len(idle) > 1 else ''} {_list(idle)}"
        text += f": the result is plain LoRA's{where}"
    advice = dict.fromkeys(each.advice for each in found if each.advice)
    return "; ".join([text, *advice]) + "."


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
