"""The names of metrics in a configuration: those of scikit-learn's scorers, and our own where they differ."""

from collections.abc import Mapping, Sequence

from rankwise.errors import InputError, nearest
from rankwise.metrics.metric import Metric

_ALSO = {
    "macro_f1": "f1_macro",
    "matthews_corrcoef": "matthews",
    "mae": "mean_absolute_error",
    "mse": "mean_squared_error",
    "rmse": "root_mean_squared_error",
}
_WITHOUT = {
    "is computed from probabilities, and metrics here are computed from predicted classes": (
        "average_precision brier_score d2_brier_score d2_log_loss_score log_loss roc_auc roc_auc_ovo "
        "roc_auc_ovo_weighted roc_auc_ovr roc_auc_ovr_weighted top_k_accuracy"
    ),
    "compares clusterings, not classes": (
        "adjusted_mutual_info_score adjusted_rand_score completeness_score fowlkes_mallows_score homogeneity_score "
        "mutual_info_score normalized_mutual_info_score rand_score v_measure_score"
    ),
    "is for rows with several classes each, and here a row has one": (
        "f1_samples jaccard_samples precision_samples recall_samples"
    ),
    "is undefined if a class is never confused": "negative_likelihood_ratio positive_likelihood_ratio",
    "cannot be computed from sums over the rows, so it would have no interval": (
        "d2_absolute_error_score max_error median_absolute_error"
    ),
    "is not defined for negative predictions, which a regression may give": (
        "mean_gamma_deviance mean_poisson_deviance mean_squared_log_error root_mean_squared_log_error"
    ),
}
"""Reason -> the scorers of scikit-learn that are missing for it, without `neg_` in their names."""


def spellings(known: Mapping[str, Metric]) -> dict[str, str]:
    """Every accepted name of the metrics in `known` -> the metric's own name.

    scikit-learn negates errors, so that more is better, and calls them `neg_…`. Here they keep their sign.
    """
    signed = {f"neg_{name}": name for name, metric in known.items() if metric.least_is_best}
    return {**{name: name for name in known}, **{also: name for also, name in _ALSO.items() if name in known}, **signed}


def chosen(names: Sequence[str], known: Mapping[str, Metric], task: str) -> tuple[str, ...]:
    """The metrics that a user names, in that order, by their own names; `known` are those for tasks of the type `task`.

    Raises InputError for no name, for one that is unknown or not for this type, and for one that is given twice.
    """
    if not names:
        raise InputError("metrics: is empty; name one metric or more, or leave it out")
    own, found = spellings(known), []
    for name in names:
        if name not in own:
            bare = name.removeprefix("neg_")
            why = next((why for why, without in _WITHOUT.items() if bare in without.split()), f"is no metric of {task}")
            raise InputError(f"metrics: {name!r} {why}{nearest(name, own)}; there are {', '.join(known)}")
        if own[name] in found:
            raise InputError(f"metrics: {own[name]} is named twice")
        found.append(own[name])
    return tuple(found)
