"""Metrics, one file per family. A metric takes predictions and labels and returns plain floats.

`rankwise.metrics.e2e` is the function; what else its file has is imported from `rankwise.metrics.e2e` as usual.
"""

from rankwise.metrics.e2e import e2e

__all__ = ["e2e"]
