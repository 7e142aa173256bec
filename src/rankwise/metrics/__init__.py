"""Metrics, one file per family. A metric takes predictions and labels and returns plain floats.

`rankwise.metrics.e2e` is the function; what else its file has is imported from `rankwise.metrics.e2e` as usual.
"""

from collections.abc import Callable

import numpy as np

from rankwise.metrics.classification import matthews_of, pearson_of, share
from rankwise.metrics.e2e import bleu_of, e2e
from rankwise.metrics.segmentation import dice_of, iou_of

__all__ = ["SUMS", "e2e"]

SUMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": share,
    "matthews": matthews_of,
    "pearson": pearson_of,
    "bleu": bleu_of,
    "dice": dice_of,
    "iou": iou_of,
}
"""Scores of whole sets by name: statistics of their examples, summed (…, k), to scores (…); NaN where there is none."""
