"""All metrics. Each family is one file, whose `METRICS` lists what it has.

`rankwise.metrics.e2e` is the function; `from rankwise.metrics.e2e import …` still reads from the file of that name.
"""

import math
from types import FunctionType
from typing import Literal

from rankwise.metrics import classification, language, regression, rouge, segmentation, wikisql
from rankwise.metrics.e2e import METRICS as OF_TEXTS
from rankwise.metrics.e2e import e2e
from rankwise.metrics.metric import FROM_ZERO, Metric
from rankwise.named import loading

__all__ = ["METRICS", "Metric", "add", "e2e", "with_direction", "worth"]

METRICS: dict[str, Metric] = {
    **classification.METRICS,
    **regression.METRICS,
    **segmentation.METRICS,
    **OF_TEXTS,
    **rouge.METRICS,
    **wikisql.METRICS,
    **language.METRICS,
    "loss": Metric(FROM_ZERO, least_is_best=True),
}


_added: dict[str, str] = {}
"""The metrics of plugins, each with its plugin."""


def add(name: str, metric: Metric, of: Literal["classes", "numbers"]) -> None:
    """Add a metric of predicted classes or numbers for `metrics: [name]`; to be called in a plugin.

    Raises:
        ValueError: another metric of that name.
        TypeError: statistics or a value that is no function; the code of both is recorded with each run.
    """
    if not (isinstance(metric.value, FunctionType) and isinstance(metric.statistics, FunctionType)):
        raise TypeError(f"the metric {name} needs functions as its statistics and its value")
    plugin = loading()
    if name in METRICS and _added.get(name) != plugin:
        raise ValueError(f"two metrics are called {name!r}")
    _added[name] = plugin
    METRICS[name] = (classification if of == "classes" else regression).METRICS[name] = metric


def worth(name: str, score: float | None) -> float:
    """How good a score of the metric `name` is, the more the better; -inf for no score."""
    if score is None:
        return -math.inf
    return -score if METRICS.get(name, Metric()).least_is_best else score


def with_direction(name: str) -> str:
    """The name of a metric in a sentence, with `(lower is better)` if it is."""
    return f"{name} (lower is better)" if METRICS.get(name, Metric()).least_is_best else name
