"""A method's decision about ranks, which the engine carries out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RankPlan(Mapping[str, int]):
    """New ranks by site name, and how to get there. `resize` carries out the whole plan, or refuses it.

    Attributes:
        ranks: site name -> new rank, a mapping or an argument of `dict`; other sites keep their rank.
        change: `svd` keeps as much of BA as the new rank can hold; `reinit` starts again with a random A and B = 0.
        empty: what happens to BA at rank 0: `drop` it, or `merge` it into W.
        moments: Adam's moments of a changed site: `reset` them, or `keep` them, transformed like the factors.
        restart: give every site new factors, even if its rank stays.
        fold: first move every scale into its factors and remove it, which changes no output.
        reset_scales: set every scale to 1 before the fold, which does change outputs.
        moved: how far the weights that decide the ranks have moved, in the method's own measure.
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
