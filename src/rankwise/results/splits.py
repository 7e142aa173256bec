"""The rows that a run was trained or scored on, as its result describes them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        name: as the task calls it.
        rows: how many.
        official: whether published numbers are computed on these rows.
        note: why not, or what else there is to know of them.
        own: what a sentence calls them where the user has brought them: "your own data"; "" for others.
    """

    name: str
    rows: int
    official: bool
    note: str = ""
    own: str = ""

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Split":
        """From `splits` of a result."""
        return cls(**{each.name: described[each.name] for each in fields(cls) if each.name in described})

    @property
    def unofficial(self) -> bool:
        """Whether numbers on these rows look like published ones and are not: nobody publishes on the user's own."""
        return not self.official and not self.own
