"""Metrics, one file per family, whose own `METRICS` names what it has; here they are together.

`rankwise.metrics.e2e` is the function; what else its file has is imported from `rankwise.metrics.e2e` as usual.
"""

from rankwise.metrics import classification, rouge, segmentation, wikisql
from rankwise.metrics.e2e import METRICS as OF_TEXTS
from rankwise.metrics.e2e import e2e
from rankwise.metrics.metric import FROM_ZERO, Metric

__all__ = ["METRICS", "Metric", "e2e"]

METRICS: dict[str, Metric] = {
    **classification.METRICS,
    **segmentation.METRICS,
    **OF_TEXTS,
    **rouge.METRICS,
    **wikisql.METRICS,
    "loss": Metric(FROM_ZERO, least_is_best=True),
}
