import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bootstrap
from rankwise.metrics.bootstrap import paired_bootstrap
from rankwise.metrics.segmentation import (
    CORPUS,
    IGNORE,
    PER_IMAGE,
    counts,
    dice,
    dice_of,
    dice_per_class,
    dice_per_image,
    iou,
    iou_of,
    iou_per_class,
    iou_per_image,
)

WITHOUT = "torchmetrics comes with the extra vision"
torchmetrics = pytest.importorskip("torchmetrics", reason=WITHOUT)
DiceScore = pytest.importorskip("torchmetrics.segmentation", reason=WITHOUT).DiceScore


@st.composite
def segmented(draw, least=1, ignored=True):
    """(predictions, labels, classes): small images in which classes are often missing and pixels often do not count."""
    classes = draw(st.integers(least, 4))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    known = st.integers(0, max(classes, 2) - 1)
    predictions = draw(arrays(np.int64, shape, elements=known))
    labels = draw(arrays(np.int64, shape, elements=st.one_of(known, st.just(IGNORE)) if ignored else known))
    labels[:, 0, 0] = predictions[:, 0, 0]  # a pixel at least counts in every image
    return predictions, labels, classes


def by_hand(predictions, labels, classes):
    """(dice, iou) of the classes that occur, from sets of pixels."""
    pixels = {(n, y, x) for n, y, x in np.ndindex(labels.shape) if labels[n, y, x] != IGNORE}
    dices, ious = [], []
    for c in [1] if classes == 1 else range(classes):
        found = {p for p in pixels if predictions[p] == c}
        there = {p for p in pixels if labels[p] == c}
        if found | there:
            dices.append(2 * len(found & there) / (len(found) + len(there)))
            ious.append(len(found & there) / len(found | there))
        elif classes == 1:
            dices.append(1.0)
            ious.append(1.0)
    return np.mean(dices), np.mean(ious)


@settings(deadline=None)
@given(segmented())
def test_dice_and_iou_are_those_of_sets_of_pixels(case):
    predictions, labels, classes = case
    found = counts(*case)
    assert (dice(found), iou(found)) == pytest.approx(by_hand(*case))
    for image, (a, b) in enumerate(zip(dice_per_image(found), iou_per_image(found), strict=True)):
        one = slice(image, image + 1)
        assert (a, b) == pytest.approx(by_hand(predictions[one], labels[one], classes))


@settings(deadline=None)
@given(segmented())
def test_the_counts_of_images_add_up_to_the_score_of_the_set(case):
    flat = counts(*case).reshape(len(case[0]), -1)
    for of, score in ((dice_of, dice), (iou_of, iou)):
        assert of(flat.sum(axis=0)) == score(counts(*case))
        sums = np.stack([flat.sum(axis=0), flat[0], np.zeros_like(flat[0])]).astype(float)
        assert of(sums).tolist() == pytest.approx([score(counts(*case)), score(counts(*case)[:1]), np.nan], nan_ok=True)


def test_scores_of_counts_need_no_torch():
    """With which a report would start seconds later."""
    code = "import sys; from rankwise.metrics.segmentation import *; "
    code += "print(dice_of(np.array([3, 1, 5, 1])), iou_of(np.zeros(8)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.75", "nan", "False"]


@settings(deadline=None, max_examples=5)
@given(segmented(), st.randoms(use_true_random=False))
def test_a_bootstrap_of_counts_is_one_of_images(case, draw):
    """With labels that are not all alike, so that a class is missing in some draws."""
    ours, labels, classes = case
    theirs = ours.copy()
    for place in np.ndindex(theirs.shape):
        theirs[place] = draw.randrange(max(classes, 2))

    def score(drawn, wanted):
        return dice(counts(drawn, wanted, classes))

    found = [counts(given, labels, classes).reshape(len(labels), -1) for given in (ours, theirs)]
    with bootstrap.few():
        expected = bootstrap.by_hand(score, [ours], [theirs], labels)
        assert paired_bootstrap(dice_of, found[:1], found[1:]) == pytest.approx(expected)
    assert paired_bootstrap(dice_of, found, found[::-1]) == pytest.approx((0.0, 0.0))


@settings(deadline=None)
@given(segmented())
def test_every_pixel_that_counts_is_counted_once_per_class(case):
    predictions, labels, classes = case
    found = counts(*case)
    assert found.shape == (len(labels), classes, 4) and found.min() >= 0
    assert (found.sum(axis=-1) == (labels != IGNORE).sum(axis=(1, 2))[:, None]).all()


@settings(deadline=None)
@given(segmented())
def test_iou_follows_from_dice_and_a_perfect_prediction_has_1(case):
    predictions, labels, classes = case
    found = counts(*case)
    a, b = dice_per_class(found), iou_per_class(found)
    assert b == pytest.approx(a / (2 - a), nan_ok=True)
    right = np.where(labels == IGNORE, predictions, labels)
    assert dice(counts(right, labels, classes)) == iou(counts(right, labels, classes)) == 1.0


@settings(deadline=None)
@given(segmented())
def test_pixels_to_ignore_and_the_order_of_images_change_nothing(case):
    predictions, labels, classes = case
    found = counts(*case)
    other = np.where(labels == IGNORE, 0, predictions)
    assert np.array_equal(counts(other, labels, classes), found)
    assert np.array_equal(counts(predictions[::-1], labels[::-1], classes)[::-1], found)
    batches = [counts(predictions[i : i + 1], labels[i : i + 1], classes) for i in range(len(labels))]
    assert np.array_equal(np.concatenate(batches), found)


@settings(deadline=None)
@given(segmented(least=2, ignored=False))
def test_torchmetrics_has_the_same_dice(case):
    predictions, labels, classes = case
    theirs = DiceScore(classes, average="none", aggregation_level="global", input_format="index")
    theirs = theirs(torch.from_numpy(predictions), torch.from_numpy(labels))
    assert dice_per_class(counts(*case)) == pytest.approx(theirs.numpy(), nan_ok=True, abs=1e-6)


@settings(deadline=None)
@given(segmented())
def test_torchmetrics_has_the_same_iou(case):
    predictions, labels, classes = case
    pair = torch.from_numpy(predictions), torch.from_numpy(labels)
    if classes == 1:
        theirs = torchmetrics.JaccardIndex("binary", ignore_index=IGNORE, zero_division=1.0)(*pair)
        assert iou(counts(*case)) == pytest.approx(float(theirs))
    else:
        theirs = torchmetrics.JaccardIndex("multiclass", num_classes=classes, ignore_index=IGNORE)(*pair)
        assert iou(counts(*case)) == pytest.approx(float(theirs))


def test_a_class_that_does_not_occur_is_left_out_and_one_wrongly_found_has_0():
    labels = np.array([[[0, 0, 1, 1]]])
    assert dice(counts(labels, labels, 3)) == 1.0
    assert np.isnan(dice_per_class(counts(labels, labels, 3))[2])
    wrong = np.array([[[0, 0, 1, 2]]])
    assert dice_per_class(counts(wrong, labels, 3)) == pytest.approx([1.0, 2 / 3, 0.0])
    assert dice(counts(wrong, labels, 3)) == pytest.approx(5 / 9)
    assert iou(counts(wrong, labels, 3)) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_an_empty_mask_is_right_when_nothing_is_found_and_wrong_else():
    empty = np.zeros((1, 2, 2), dtype=np.int64)
    assert dice(counts(empty, empty, 1)) == iou(counts(empty, empty, 1)) == 1.0
    assert dice(counts(1 - empty, empty, 1)) == dice(counts(empty, 1 - empty, 1)) == 0.0


def test_the_corpus_is_one_large_image_and_not_the_mean_of_its_images():
    labels = np.array([[[1, 1, 1, 1]], [[1, 0, 0, 0]]])
    predictions = np.array([[[1, 1, 1, 1]], [[0, 0, 0, 0]]])
    found = counts(predictions, labels, 1)
    assert dice(found) == pytest.approx(8 / 9) and dice_per_image(found).tolist() == [1.0, 0.0]


def test_masks_of_bytes_and_booleans_are_numbers_too():
    labels = np.array([[[0, 1, 1]]])
    assert dice(counts(np.array([[[False, True, True]]]), labels.astype(np.uint8), 1)) == 1.0


def test_images_without_a_pixel_that_counts_are_no_trouble_beside_others_but_have_no_score():
    labels = np.array([[[0, 1]], [[IGNORE, IGNORE]]])
    found = counts(np.zeros_like(labels), labels, 2)
    assert dice(found) == pytest.approx((2 / 3 + 0) / 2)
    for score in PER_IMAGE.values():
        assert np.isnan(score(found)).tolist() == [False, True]
    for score in CORPUS.values():
        with pytest.raises(ValueError, match="all images: no pixel counts"):
            score(found[1:])


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([[[0, 3]]], [[[0, 1]]], "predictions go from 0 to 3; they must be whole numbers from 0 to 2; take the argmax"),
        ([[[0, -100]]], [[[0, 1]]], "predictions go from -100 to 0"),
        ([[[0, 1]]], [[[0, 255]]], "labels go from 0 to 255; they must be whole numbers from 0 to 2, or -100"),
        ([[[0.2, 0.9]]], [[[0, 1]]], "take the argmax"),
        ([[[0.0, np.nan]]], [[[0, 1]]], "predictions go from nan to nan"),
        ([[0, 1]], [[0, 1]], "one shape"),
        ([[[0, 1]]], [[[0]]], "one shape"),
        (np.zeros((0, 2, 2)), np.zeros((0, 2, 2)), "n at least 1"),
    ],
)
def test_what_is_no_segmentation_is_refused_in_one_line(predictions, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        counts(np.array(predictions), np.array(labels), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("RANKWISE_DATA" not in os.environ, reason="RANKWISE_DATA names no folder of data sets")
def test_real_masks_shifted_by_a_pixel_score_between_0_and_1():
    pq = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    path = Path(os.environ["RANKWISE_DATA"]) / "segmentation" / "camvid" / "validation.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    stored = pq.read_table(path, columns=["mask"])["mask"].to_pylist()[:4]
    masks = np.stack([np.asarray(image.open(io.BytesIO(mask))) for mask in stored]).astype(np.int64)
    labels = np.where(masks == 11, IGNORE, masks)
    moved = np.where(np.roll(masks, 1, axis=2) == 11, 0, np.roll(masks, 1, axis=2))
    found = counts(moved, labels, 11)
    assert (dice(found), iou(found)) == pytest.approx(by_hand(moved, labels, 11))
    assert 0.5 < iou(found) < dice(found) < 1.0
    theirs = torchmetrics.JaccardIndex("multiclass", num_classes=11, ignore_index=IGNORE)
    assert iou(found) == pytest.approx(float(theirs(torch.from_numpy(moved), torch.from_numpy(labels))))
