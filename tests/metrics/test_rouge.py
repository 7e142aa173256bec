"""ROUGE with stemming: values by hand, its definition, and what several references do."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import InputError
from rankwise.metrics.rouge import NAMES, per_example, rouge

pytest.importorskip("rouge_score", reason="needs the extra [nlg]")
porter = pytest.importorskip("nltk.stem.porter", reason="needs the extra [nlg]")

SAMSUM = Path(os.environ.get("RANKWISE_DATA") or "nowhere") / "samsum" / "test.parquet"

words = st.sampled_from(["the", "a", "dog", "dogs", "running", "runs", "home", "Home,", "7", "it's"])
texts = st.lists(words, min_size=1, max_size=10).map(" ".join)
examples = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


def plain(hypothesis, reference):
    """The three F1 by their definition."""
    stem = porter.PorterStemmer().stem
    made, wanted = (
        [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]
        for text in (hypothesis, reference)
    )

    def f1(shared, a, b):
        return 2 * shared / (a + b) if shared else 0.0

    scores = {}
    for name, n in (("rouge_1", 1), ("rouge_2", 2)):
        a, b = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (made, wanted))
        scores[name] = f1((a & b).total(), a.total(), b.total())
    row = [0] * (len(wanted) + 1)
    for word in made:
        old = row[:]
        for place, other in enumerate(wanted):
            row[place + 1] = old[place] + 1 if word == other else max(old[place + 1], row[place])
    return scores | {"rouge_l": f1(row[-1], len(made), len(wanted))}


def test_values_by_hand():
    scores = rouge(["the cat sat", "dogs running"], ["the cat", "run dog"])
    # first: 2 of 3 and 2 of 2 words, 1 of 2 and 1 of 1 pairs; second: the stems agree, their order does not
    assert scores == pytest.approx({"rouge_1": (0.8 + 1) / 2, "rouge_2": (2 / 3 + 0) / 2, "rouge_l": (0.8 + 0.5) / 2})


@given(examples)
def test_every_example_is_the_definition_with_the_best_reference_for_each_metric(rows):
    scores = per_example([row[0] for row in rows], [row[1] for row in rows])
    assert list(scores) == list(NAMES)
    for place, (hypothesis, group) in enumerate(rows):
        each = [plain(hypothesis, reference) for reference in group]
        for name, values in scores.items():
            assert values.shape == (len(rows),)
            assert values[place] == pytest.approx(max(one[name] for one in each), abs=1e-12)


@given(examples)
def test_the_score_of_a_set_is_the_mean_of_its_examples(rows):
    hypotheses, references = [row[0] for row in rows], [row[1] for row in rows]
    scores = per_example(hypotheses, references)
    assert rouge(hypotheses, references) == pytest.approx({name: np.mean(scores[name]) for name in NAMES})


@given(examples, texts)
def test_another_reference_never_lowers_a_score_and_the_text_itself_makes_it_1(rows, other):
    hypotheses, references = [row[0] for row in rows], [row[1] for row in rows]
    before, after = per_example(hypotheses, references), per_example(hypotheses, [[*r, other] for r in references])
    own = per_example(hypotheses, [[*group, text] for text, group in rows])
    for name in NAMES:
        assert (after[name] >= before[name]).all()
        assert (before[name] >= 0.0).all() and (before[name] <= 1.0).all()
        assert own[name] == pytest.approx(1.0) or name == "rouge_2"  # one word has no pairs


@given(examples)
def test_one_reference_may_stand_without_a_list(rows):
    hypotheses, references = [row[0] for row in rows], [row[1][0] for row in rows]
    assert rouge(hypotheses, references) == rouge(hypotheses, [[text] for text in references])


def test_an_empty_output_scores_0():
    assert rouge(["", "…"], ["a dog", "a dog"]) == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "no hypotheses"),
        (["a"], ["a", "b"], "1 hypotheses and 2 references"),
        (["a", "b"], ["a", " "], "example 1 has a reference without text"),
        (["a", "b"], ["a", ["b", ""]], "example 1 has a reference without text"),
        (["a"], [[]], "example 0 has a reference without text"),
        ([None], ["a"], "example 0 has something that is not text"),
        ("abc", ["a", "b", "c"], "must be lists"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(hypotheses, references, message):
    for metric in (rouge, per_example):
        with pytest.raises(InputError, match=message) as caught:
            metric(hypotheses, references)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not SAMSUM.is_file(), reason="RANKWISE_DATA has no samsum/test.parquet")
def test_real_summaries_score_as_the_definition_says():
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [bench]")
    rows = parquet.read_table(SAMSUM).slice(0, 100).to_pylist()
    outputs = [" ".join(row["dialogue"].split()[:20]) for row in rows]
    scores = per_example(outputs, [row["summary"] for row in rows])
    for place, (output, row) in enumerate(zip(outputs, rows, strict=True)):
        expected = plain(output, row["summary"])
        assert {name: scores[name][place] for name in NAMES} == pytest.approx(expected, abs=1e-12)
    assert 0.1 < scores["rouge_1"].mean() < 0.5
