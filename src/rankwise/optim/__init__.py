"""The optimizer that goes along with rank changes, and the projections and proximal maps that follow its step."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.optim.simplex_adam import SimplexAdam

__all__ = ["SimplexAdam"]


def __getattr__(name: str) -> Any:
    if name != "SimplexAdam":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rankwise.optim.simplex_adam import SimplexAdam  # not before it is needed: the maps need torch alone

    return SimplexAdam
