"""ROUGE-1, ROUGE-2 and ROUGE-L F1 with stemming (Lin 2004), on the scale 0 to 1, by rouge-score.

Papers print them times 100. Words are runs of a–z and 0–9 without case, those of four letters or more stemmed (Porter);
other scripts count nothing. ROUGE-L takes a text as one sequence, over line ends (rouge-score's rougeL, not rougeLsum).
"""

from collections.abc import Sequence

import numpy as np

from rankwise.errors import InputError, need
from rankwise.metrics.metric import Metric

NAMES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""The metrics' names here, and those of rouge-score."""
METRICS = dict.fromkeys(NAMES, Metric())


def per_example(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, np.ndarray]:
    """`rouge_1`, `rouge_2` and `rouge_l`, each (n,) floats from 0 to 1: F1 of every hypothesis.

    A reference is one text or a list of texts; of several the best counts, for each metric on its own. An empty
    hypothesis scores 0. InputError for counts that differ, for nothing at all and for a reference without text.
    """
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise InputError("hypotheses and references must be lists, with one entry for each example")
    if len(hypotheses) != len(references):
        raise InputError(f"{len(hypotheses)} hypotheses and {len(references)} references: there must be one for each")
    if not hypotheses:
        raise InputError("there are no hypotheses to score")
    scorer = need("rouge_score.rouge_scorer", "nlg").RougeScorer(list(NAMES.values()), use_stemmer=True)
    scores = {name: np.zeros(len(hypotheses)) for name in NAMES}
    for row, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True)):
        texts = [reference] if isinstance(reference, str) else list(reference)
        if not isinstance(hypothesis, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"example {row} has something that is not text")
        if not texts or not all(text.strip() for text in texts):
            raise InputError(f"example {row} has a reference without text: leave that example out")
        best = scorer.score_multi(texts, hypothesis)
        for name, theirs in NAMES.items():
            scores[name][row] = best[theirs].fmeasure
    return scores


def rouge(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """`rouge_1`, `rouge_2` and `rouge_l`, 0 to 1: means of `per_example` over the examples."""
    return {name: float(values.mean()) for name, values in per_example(hypotheses, references).items()}
