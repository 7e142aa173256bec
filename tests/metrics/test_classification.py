"""The metrics agree with scikit-learn and scipy where those are defined, and have a value where they are not."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import assume, given
from hypothesis import strategies as st

from rankwise.metrics import classification, regression
from rankwise.metrics.classification import accuracy, f1, matthews
from rankwise.metrics.metric import finite
from rankwise.metrics.regression import pearson, spearman

METRICS = {**classification.METRICS, **regression.METRICS}

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def pairs(values):
    return st.integers(2, 40).flatmap(
        lambda n: st.tuples(st.lists(values, min_size=n, max_size=n), st.lists(values, min_size=n, max_size=n))
    )


@given(pairs(st.integers(0, 2)))
def test_accuracy_and_matthews_agree_with_sklearn(pair):
    predictions, labels = pair
    assert accuracy(predictions, labels) == sklearn.metrics.accuracy_score(labels, predictions)
    assume(len(set(predictions)) > 1 and len(set(labels)) > 1)
    assert matthews(predictions, labels) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions))


@given(pairs(st.integers(0, 1)))
def test_f1_agrees_with_sklearn(pair):
    predictions, labels = pair
    assert f1(predictions, labels) == pytest.approx(sklearn.metrics.f1_score(labels, predictions, zero_division=0.0))


@given(pairs(floats))
def test_correlations_agree_with_scipy(pair):
    predictions, labels = pair
    assume(np.std(predictions) > 1e-3 and np.std(labels) > 1e-3)
    assert pearson(predictions, labels) == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-6)
    assert spearman(predictions, labels) == pytest.approx(
        scipy.stats.spearmanr(predictions, labels).statistic, abs=1e-9
    )


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), pairs(floats))
def test_constant_predictions_or_labels_correlate_0(constant, pair):
    values = pair[0]
    for metric in (pearson, spearman):
        assert metric([constant] * len(values), values) == 0.0
        assert metric(values, [constant] * len(values)) == 0.0


@given(pairs(st.integers(0, 1)))
def test_one_class_only_has_matthews_0(pair):
    values = pair[0]
    for constant in (0, 1):
        assert matthews([constant] * len(values), values) == 0.0
        assert matthews(values, [constant] * len(values)) == 0.0


def test_f1_of_nothing_found_and_nothing_there_is_0():
    assert f1([0, 0], [0, 0]) == 0.0
    assert f1([0, 0], [1, 1]) == 0.0
    assert f1([1, 1], [1, 1]) == 1.0


@given(pairs(floats))
def test_correlations_stay_between_minus_1_and_1(pair):
    for metric in (pearson, spearman):
        assert -1.0 <= metric(*pair) <= 1.0


def test_a_single_row_has_a_value():
    assert accuracy([1], [1]) == 1.0
    assert matthews([1], [1]) == pearson([0.5], [1.0]) == spearman([0.5], [1.0]) == 0.0


def test_nearly_constant_predictions_do_not_warn():
    assert -1.0 <= pearson([1.0, 1.0, 1.0 + 1e-15], [1.0, 2.0, 3.0]) <= 1.0


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_is_refused(name, bad):
    with pytest.raises(ValueError, match="1 of 3 predictions are not finite"):
        METRICS[name]([0.0, bad, 1.0], [0, 1, 1])


@pytest.mark.parametrize("name", METRICS)
def test_shapes_that_differ_are_refused(name):
    for predictions, labels in (([0, 1], [0]), ([], []), ([[0, 1]], [[0, 1]])):
        with pytest.raises(ValueError, match="one shape"):
            METRICS[name](predictions, labels)


def test_labels_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="labels must be finite"):
        pearson([0.0, 1.0], [0.0, np.nan])


@pytest.mark.parametrize("metric", [accuracy, f1, matthews])
def test_logits_are_not_classes(metric):
    with pytest.raises(ValueError, match="whole numbers"):
        metric([0.3, 0.7], [0, 1])


def test_finite_lets_finite_values_through():
    assert finite([1, 2.5]).tolist() == [1.0, 2.5]


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "pearson"])
@given(data=st.data())
def test_what_examples_add_up_to_is_the_metric(name, data):
    values = {"accuracy": st.integers(0, 3), "f1": st.integers(0, 1), "matthews": st.integers(0, 2), "pearson": floats}
    predictions, labels = data.draw(pairs(values[name]))
    spreads = [np.std(each) for each in (predictions, labels)]
    if name == "pearson":  # beside values a million times as far apart nearly constant ones are constant
        assume(all(spread > 1e-3 * (1 + np.abs(predictions).max()) for spread in spreads))
    metric = METRICS[name]
    assert metric.of_any_sum
    sums = metric.statistics(predictions, labels).sum(axis=0)
    together = metric.value(np.stack([sums, 2 * sums]))
    assert together == pytest.approx([METRICS[name](predictions, labels)] * 2, abs=1e-9)


@pytest.mark.parametrize("name", ["matthews", "pearson"])
@pytest.mark.parametrize("pair", [([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([0, 0], [0, 0])])
def test_constant_input_adds_up_to_0_as_in_the_metric(name, pair):
    metric = METRICS[name]
    assert metric.value(metric.statistics(*pair).sum(axis=0)) == metric(*pair) == 0.0
