"""The optimizer that follows rank changes, and the projections and proximal maps applied after its steps."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.optim.simplex_adam import SimplexAdam

__all__ = ["SimplexAdam"]


def __getattr__(name: str) -> Any:
    if name != "SimplexAdam":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rankwise.optim.simplex_adam import SimplexAdam  # only when needed: `project` imports nothing but torch

    return SimplexAdam
