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
        note: why not, or anything else worth knowing about them.
        own: what to call rows of the user's own, such as "your own data"; "" for others.
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
        """Whether numbers on these rows could be mistaken for published ones; the user's own data has none."""
        return not self.official and not self.own
