"""The metrics that a user names: scikit-learn's, with its values, or refused with a reason."""

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import example, given
from hypothesis import strategies as st

from rankwise.errors import InputError
from rankwise.metrics import METRICS, classification, regression, with_direction, worth
from rankwise.metrics.names import chosen, spellings

SCORERS = sklearn.metrics.get_scorer_names()
CLASSES, NUMBERS = spellings(classification.METRICS), spellings(regression.METRICS)
OF_TWO = sorted(classification.OF_TWO)
OF_CLASSES = sorted(({*CLASSES} - {*OF_TWO}) & {*SCORERS})
REFUSED = sorted({*SCORERS} - {*CLASSES, *NUMBERS})


def theirs(name, predictions, labels):
    """The score of scikit-learn's scorer, without the change of sign."""
    scorer = sklearn.metrics.get_scorer(name)
    with warnings.catch_warnings():  # of classes that are never predicted, or never true
        warnings.simplefilter("ignore")
        return float(scorer._score_func(labels, predictions, **scorer._kwargs))


def rows(values, least=1):
    return st.lists(st.tuples(values, values), min_size=least, max_size=60).map(lambda pairs: zip(*pairs, strict=True))


@pytest.mark.parametrize("name", OF_CLASSES)
@given(n=st.integers(1, 60), data=st.data())
def test_metrics_of_classes_have_the_values_of_scikit_learn(name, n, data):
    predictions, labels = (
        data.draw(
            st.sets(st.integers(0, 7), min_size=1).flatmap(
                lambda classes: st.lists(st.sampled_from(sorted(classes)), min_size=n, max_size=n)
            )
        )
        for _ in range(2)
    )
    assert METRICS[CLASSES[name]](predictions, labels) == pytest.approx(theirs(name, predictions, labels), abs=1e-12)


@pytest.mark.parametrize("name", OF_TWO)
@given(pairs=rows(st.integers(0, 1)))
def test_metrics_of_two_classes_have_the_values_of_scikit_learn(name, pairs):
    predictions, labels = pairs
    assert METRICS[name](predictions, labels) == pytest.approx(theirs(name, predictions, labels), abs=1e-12)


@pytest.mark.parametrize("name", sorted({*NUMBERS} & {*SCORERS}))
@given(pairs=rows(st.integers(-1000, 1000).map(lambda each: each / 8), least=2))
@example(pairs=[(1.0, 2.0), (3.0, 3.0)])
@example(pairs=[(1.0, 3.0), (3.0, 3.0)])
@example(pairs=[(2.0, 3.0), (2.0, 3.0)])
def test_metrics_of_numbers_have_the_values_of_scikit_learn(name, pairs):
    predictions, labels = map(np.array, pairs)
    wanted = theirs(name, predictions, labels)
    assert METRICS[NUMBERS[name]](predictions, labels) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_every_scorer_of_scikit_learn_is_taken_or_refused_with_a_reason():
    for name in REFUSED:
        for task, known in (("classification", classification.METRICS), ("regression", regression.METRICS)):
            with pytest.raises(InputError) as error:
                chosen([name], known, task)
            assert str(error.value).startswith(f"metrics: {name!r} ")
            assert "is no metric of" not in str(error.value), "no reason is given"
            assert str(error.value).endswith(f"; there are {', '.join(known)}") and "\n" not in str(error.value)
    with_predictions = [name for name in SCORERS if sklearn.metrics.get_scorer(name)._response_method == "predict"]
    assert {*SCORERS} - {*with_predictions} <= {*REFUSED}, "these need probabilities"


def test_what_is_better_is_what_scikit_learn_says():
    for name in {*CLASSES, *NUMBERS} & {*SCORERS}:
        own = CLASSES.get(name) or NUMBERS[name]
        assert METRICS[own].least_is_best == (sklearn.metrics.get_scorer(name)._sign == -1)
        assert (worth(own, 2.0) > worth(own, 1.0) > worth(own, None)) != METRICS[own].least_is_best
        assert worth(own, 1.0) > worth(own, None) == -np.inf


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "metrics: is empty; name one metric or more, or leave it out"),
        (
            ["f1_marco"],
            "metrics: 'f1_marco' is no metric of classification (did you mean \"f1_macro\"?); there are accuracy, ",
        ),
        (["r2"], "metrics: 'r2' is no metric of classification; there are accuracy, balanced_accuracy, "),
        (["neg_accuracy"], "metrics: 'neg_accuracy' is no metric of classification (did you mean"),
        (
            ["roc_auc"],
            "metrics: 'roc_auc' is computed from probabilities, and metrics here are computed from predicted classes",
        ),
        (["f1_macro", "macro_f1"], "metrics: f1_macro is named twice"),
    ],
)
def test_names_that_cannot_be_taken_are_refused_in_one_line(names, message):
    with pytest.raises(InputError) as error:
        chosen(names, classification.METRICS, "classification")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_other_spellings_stand_for_our_names():
    assert chosen(["macro_f1", "matthews_corrcoef"], classification.METRICS, "pair") == ("f1_macro", "matthews")
    numbers = ["neg_mean_absolute_error", "rmse", "r2"]
    wanted = ("mean_absolute_error", "root_mean_squared_error", "r2")
    assert chosen(numbers, regression.METRICS, "regression") == wanted
    assert with_direction("mean_absolute_error") == "mean_absolute_error (lower is better)"
    assert with_direction("r2") == "r2" and with_direction("") == ""


@given(pairs=rows(st.integers(0, 4)), parts=st.integers(1, 5))
@pytest.mark.parametrize("name", ["f1_macro", "recall_weighted", "jaccard_macro", "matthews", "balanced_accuracy"])
def test_scores_are_of_all_rows_and_not_means_over_batches(name, pairs, parts):
    """Sums of batches that hold all classes in one order give the score of the whole set, however it was cut."""
    predictions, labels = map(np.array, pairs)
    every = np.arange(5)  # a row of each class, so that batches have the same columns
    whole = METRICS[name].statistics(np.append(predictions, every), np.append(labels, every))
    batches = np.array_split(np.arange(len(predictions)), parts)
    sums = sum(whole[each].sum(axis=0) for each in batches)
    assert METRICS[name].value(sums) == pytest.approx(METRICS[name](predictions, labels), abs=1e-12)


@given(pairs=rows(st.integers(0, 4)), names=st.permutations(range(5)), order=st.randoms())
@pytest.mark.parametrize("name", sorted({*classification.METRICS} - {*OF_TWO}))
def test_neither_the_order_of_the_rows_nor_the_numbers_of_the_classes_matter(name, pairs, names, order):
    predictions, labels = map(np.array, pairs)
    places = list(range(len(labels)))
    order.shuffle(places)
    renamed = [np.array(names)[each][places] for each in (predictions, labels)]
    assert METRICS[name](*renamed) == pytest.approx(METRICS[name](predictions, labels), abs=1e-12)


def test_a_class_of_no_row_is_left_out_of_a_macro_mean_and_one_predicted_in_vain_is_not():
    assert METRICS["f1_macro"]([0, 1, 1], [0, 1, 1]) == 1.0  # of five classes, say, only two of which are in these rows
    assert METRICS["f1_macro"]([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert METRICS["balanced_accuracy"]([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 1 / 2) / 2)


def test_a_thousand_classes_take_no_more_memory_than_the_rows():
    found = METRICS["f1_macro"].statistics(np.arange(4000) % 1000, np.arange(4000) % 999)
    assert found.shape == (4000, 3000) and found.nnz <= 3 * 4000
