"""The optimizer that goes along with rank changes, and the projections and proximal maps that follow its step."""

from rankwise.optim.simplex_adam import SimplexAdam

__all__ = ["SimplexAdam"]
