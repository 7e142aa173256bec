"""All metrics. Each family is one file, whose `METRICS` lists what it has.

`rankwise.metrics.e2e` is the function; `from rankwise.metrics.e2e import …` still reads from the file of that name.
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
