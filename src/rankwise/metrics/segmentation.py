"""Dice and IoU of segmentations, over torchmetrics' counts of pixels.

With TP, FP and FN the pixels of class c that are found, wrongly found and missed,

    Dice_c = 2 TP / (2 TP + FP + FN)        IoU_c = TP / (TP + FP + FN)

Pixels whose label is -100 count nowhere. `counts` does the counting, for a batch at a time where need be, and all
scores are computed from counts put one after the other:

    corpus      TP, FP and FN summed over all images, then the mean over the classes
    per class   the same without the mean
    per image   each image by itself, then the mean over its classes; for tests that pair two methods image by image

The mean is over the classes that occur, in the labels or in the predictions: a class that is found where it is not has
0, one that is neither there nor found has no value and is left out. With `classes=1` there is a foreground alone, label
1 against 0: where it is neither there nor found, Dice and IoU are 1, for an empty mask is then the right one.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rankwise.errors import need
from rankwise.metrics.metric import Metric

IGNORE = -100


def counts(predictions: ArrayLike, labels: ArrayLike, classes: int) -> np.ndarray:
    """TP, FP, TN and FN of each image and class, (n, classes, 4), whole numbers of pixels.

    Args:
        predictions: (n, H, W), 0 to classes - 1. labels: the same, or -100 where a pixel does not count.
        classes: how many there are; for 1, which is the foreground, predictions and labels are 0 or 1.
    Raises:
        ValueError: shapes that differ, no image, or a value that is no class.
    """
    torch = need("torch", "vision")  # not an import: a report has the scores from counts, and starts without torch
    official = need("torchmetrics.functional.classification", "vision")
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 3 or predicted.shape != wanted.shape or not predicted.size:
        raise ValueError(
            f"predictions {predicted.shape} and labels {wanted.shape} must have one shape (n, H, W), n at least 1"
        )
    most = max(classes, 2) - 1
    _check("predictions", predicted, most)
    _check("labels", wanted[wanted != IGNORE], most)
    options = {"ignore_index": IGNORE, "validate_args": False}
    found = []
    for pair in zip(predicted, wanted, strict=True):  # one by one, for several at once torchmetrics widens each pixel
        image = [torch.from_numpy(values.astype(np.int64)) for values in pair]
        if classes == 1:
            found.append(official.binary_stat_scores(*image, **options)[None])
        else:
            image = [values.flatten()[None] for values in image]
            found.append(official.multiclass_stat_scores(*image, classes, average=None, **options))
    return torch.stack(found)[..., :4].numpy()


def dice(counts: np.ndarray) -> float:
    """Corpus Dice, 0 to 1, of `counts` (n, classes, 4)."""
    return _corpus(dice_per_image, counts)


def iou(counts: np.ndarray) -> float:
    """Corpus IoU, also called Jaccard index or mean IoU, 0 to 1, of `counts` (n, classes, 4)."""
    return _corpus(iou_per_image, counts)


def dice_per_class(counts: np.ndarray) -> np.ndarray:
    """Corpus Dice of each class, (classes,); NaN for a class that does not occur."""
    return _dice(counts.sum(axis=0))


def iou_per_class(counts: np.ndarray) -> np.ndarray:
    """Corpus IoU of each class, (classes,); NaN for a class that does not occur."""
    return _iou(counts.sum(axis=0))


def dice_per_image(counts: np.ndarray) -> np.ndarray:
    """Dice of each image (…) of `counts` (…, classes, 4); NaN for an image in which no pixel counts."""
    return _mean(_dice, counts)


def iou_per_image(counts: np.ndarray) -> np.ndarray:
    """IoU of each image (…) of `counts` (…, classes, 4); NaN for an image in which no pixel counts."""
    return _mean(_iou, counts)


def dice_of(sums: np.ndarray) -> np.ndarray:
    """Corpus Dice (…) of sets from their counts, summed over the images and flattened, (…, 4 classes); NaN as above."""
    return dice_per_image(_unflattened(sums))


def iou_of(sums: np.ndarray) -> np.ndarray:
    """Corpus IoU (…) of sets from their counts, summed over the images and flattened, (…, 4 classes); NaN as above."""
    return iou_per_image(_unflattened(sums))


METRICS = {"dice": Metric(value=dice_of), "iou": Metric(value=iou_of)}
CORPUS: dict[str, Callable[[np.ndarray], float]] = {"dice": dice, "iou": iou}
PER_IMAGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"dice": dice_per_image, "iou": iou_per_image}


def _unflattened(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, 4)


def _check(name: str, values: np.ndarray, most: int) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= most and (values == np.floor(values)).all()):
        raise ValueError(
            f"{name} go from {values.min()} to {values.max()}; they must be whole numbers from 0 to {most}"
            + (f", or {IGNORE} for pixels to ignore" if name == "labels" else "; take the argmax of the logits first")
        )


def _dice(counts: np.ndarray) -> np.ndarray:
    tp, fp, _, fn = np.moveaxis(counts, -1, 0)
    return _share(2 * tp, 2 * tp + fp + fn)


def _iou(counts: np.ndarray) -> np.ndarray:
    tp, fp, _, fn = np.moveaxis(counts, -1, 0)
    return _share(tp, tp + fp + fn)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole with NaN for 0 / 0; with a single class, the foreground, that is 1."""
    nothing = 1.0 if part.shape[-1] == 1 else np.nan
    return np.divide(part, whole, out=np.full(part.shape, nothing), where=whole > 0)


def _mean(score: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Mean of the scores (…, classes) over the classes that occur; NaN where no pixel counts."""
    scores = score(counts)
    occur = ~np.isnan(scores)
    some = counts.sum(axis=(-2, -1)) > 0
    total = np.where(occur, scores, 0.0).sum(axis=-1)
    return np.divide(total, occur.sum(axis=-1), out=np.full(some.shape, np.nan), where=some)


def _corpus(score: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> float:
    value = float(score(counts.sum(axis=0)))
    if np.isnan(value):
        raise ValueError("all images: no pixel counts, so there is nothing to score")
    return value
