"""Metrics, one file per family; `METRICS` has them by name. A metric takes predictions and labels and returns a float.

`rankwise.metrics.e2e` is the function; what else its file has is imported from `rankwise.metrics.e2e` as usual.
"""

from rankwise.metrics import classification
from rankwise.metrics.e2e import bleu_of, e2e
from rankwise.metrics.metric import FROM_ZERO, Metric
from rankwise.metrics.segmentation import dice_of, iou_of

__all__ = ["METRICS", "Metric", "e2e"]

METRICS: dict[str, Metric] = {
    **classification.METRICS,
    "bleu": Metric((0.0, 100.0), bleu_of),
    "dice": Metric(value=dice_of),
    "iou": Metric(value=iou_of),
    **dict.fromkeys(("meteor", "rouge_1", "rouge_2", "rouge_l", "logical_form", "execution"), Metric()),
    **dict.fromkeys(("nist", "cider"), Metric(FROM_ZERO)),
    "loss": Metric(FROM_ZERO, least_is_best=True),
}
