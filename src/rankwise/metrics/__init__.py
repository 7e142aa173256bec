"""All metrics. Each family is one file, whose `METRICS` lists what it has.

`rankwise.metrics.e2e` is the function; `from rankwise.metrics.e2e import …` still reads from the file of that name.
"""

import math

from rankwise.metrics import classification, regression, rouge, segmentation, wikisql
from rankwise.metrics.e2e import METRICS as OF_TEXTS
from rankwise.metrics.e2e import e2e
from rankwise.metrics.metric import FROM_ZERO, Metric

__all__ = ["METRICS", "Metric", "e2e", "with_direction", "worth"]

METRICS: dict[str, Metric] = {
    **classification.METRICS,
    **regression.METRICS,
    **segmentation.METRICS,
    **OF_TEXTS,
    **rouge.METRICS,
    **wikisql.METRICS,
    "loss": Metric(FROM_ZERO, least_is_best=True),
}


def worth(name: str, score: float | None) -> float:
    """How good a score of the metric `name` is, the more the better; -inf for no score."""
    if score is None:
        return -math.inf
    return -score if METRICS.get(name, Metric()).least_is_best else score


def with_direction(name: str) -> str:
    """The name of a metric in a sentence, with `(lower is better)` where that is so."""
    return f"{name} (lower is better)" if METRICS.get(name, Metric()).least_is_best else name
