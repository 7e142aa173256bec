"""Metrics of a model of language, from the loss of each token that it has to predict; tasks write the statistics."""

import math

import numpy as np

from rankwise.metrics.metric import Metric, mean_of_sums


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """exp of the mean loss per token, from the sums (…, 2) of the losses in nats and of the tokens."""
    with np.errstate(over="ignore"):
        found: np.ndarray = np.exp(mean_of_sums(sums))
    return found


METRICS = {
    "perplexity": Metric((1.0, math.inf), _perplexity, least_is_best=True),
    "token_accuracy": Metric(),
}
