"""What a method decides about ranks, for the engine to carry out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RankPlan(Mapping[str, int]):
    """New ranks by site name, and how to get there. `resize` carries out a plan whole, or refuses it whole.

    Attributes:
        ranks: site name -> new rank, a mapping or what `dict` makes one of; sites that are not named keep theirs.
        change: `svd` keeps as much of BA as the new rank can hold; `reinit` draws A afresh and sets B = 0.
        empty: what becomes of BA at rank 0: `drop` it, or `merge` it into W.
        moments: Adam's moments of a changed site are `reset`, or `keep`: carried along with the factors.
        restart: draw fresh factors for every site, also where the rank stays.
        fold: first move every scale into its factors and take it away, which changes no output.
        reset_scales: set every scale to 1 before the fold, which does change outputs.
        moved: how far the weights that the ranks follow have moved, in the method's own measure.
    """

    ranks: Mapping[str, int]
    change: Literal["svd", "reinit"] = "svd"
    empty: Literal["drop", "merge"] = "drop"
    moments: Literal["reset", "keep"] = "reset"
    restart: bool = False
    fold: bool = False
    reset_scales: bool = False
    moved: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", dict(self.ranks))

    def __getitem__(self, site: str) -> int:
        return self.ranks[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)
