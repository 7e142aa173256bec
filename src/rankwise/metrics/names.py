"""The names by which a user asks for metrics: scikit-learn's scorers, and ours where these differ."""

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
    "is computed from probabilities, and these metrics are of the classes predicted": (
        "average_precision brier_score d2_brier_score d2_log_loss_score log_loss roc_auc roc_auc_ovo "
        "roc_auc_ovo_weighted roc_auc_ovr roc_auc_ovr_weighted top_k_accuracy"
    ),
    "compares clusterings, which have no classes to be right about": (
        "adjusted_mutual_info_score adjusted_rand_score completeness_score fowlkes_mallows_score homogeneity_score "
        "mutual_info_score normalized_mutual_info_score rand_score v_measure_score"
    ),
    "is for rows with several classes each, and here a row has one": (
        "f1_samples jaccard_samples precision_samples recall_samples"
    ),
    "has no value where a class is never confused": "negative_likelihood_ratio positive_likelihood_ratio",
    "is no function of sums over the rows, so no interval over the rows could be given": (
        "d2_absolute_error_score max_error median_absolute_error"
    ),
    "is not defined for negative predictions, which a regression may give": (
        "mean_gamma_deviance mean_poisson_deviance mean_squared_log_error root_mean_squared_log_error"
    ),
}
"""Why there is none of scikit-learn's other scorers, whose names have no `neg_` here."""


def spellings(known: Mapping[str, Metric]) -> dict[str, str]:
    """All names that are taken for the metrics of `known`, each with its own name.

    scikit-learn's `neg_` turns a sign, so that more is better. Here it is not needed, and scores have their own sign.
    """
    signed = {f"neg_{name}": name for name, metric in known.items() if metric.least_is_best}
    return {**{name: name for name in known}, **{also: name for also, name in _ALSO.items() if name in known}, **signed}


def chosen(names: Sequence[str], known: Mapping[str, Metric], task: str) -> tuple[str, ...]:
    """The metrics of `known`, those of the type `task`, that a user names, in that order.

    Raises InputError for no name, for one that is unknown or not of this type, and for one that is there twice.
    """
    if not names:
        raise InputError("metrics: is empty; name one metric or more, or leave it out")
    own, found = spellings(known), []
    for name in names:
        if name not in own:
            bare = name.removeprefix("neg_")
            why = next((why for why, without in _WITHOUT.items() if bare in without.split()), f"is none of {task}")
            raise InputError(f"metrics: {name!r} {why}{nearest(name, own)}; there are {', '.join(known)}")
        if own[name] in found:
            raise InputError(f"metrics: {own[name]} is named twice")
        found.append(own[name])
    return tuple(found)
