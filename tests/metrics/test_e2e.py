"""The five metrics of the E2E challenge equal the official values, or say why they cannot be had."""

import importlib
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bootstrap
import rankwise.metrics
from rankwise.errors import InputError
from rankwise.metrics.bootstrap import paired_bootstrap
from rankwise.metrics.e2e import bleu, bleu_of, bleu_statistics, e2e, nist, unavailable

sacrebleu = pytest.importorskip("sacrebleu.metrics", reason="needs the extra [nlg]")
pytest.importorskip("pycocoevalcap.meteor.meteor", reason="needs the extra [nlg]")
# the attribute `e2e` of the package is the function
module = importlib.import_module("rankwise.metrics.e2e")

SMALL = json.loads((Path(__file__).parent / "e2e_small.json").read_text(encoding="utf-8"))
NO_JAVA = unavailable()
java = pytest.mark.skipif(bool(NO_JAVA), reason=NO_JAVA)

words = st.sampled_from(["the", "a", "pub", "near", "river", "cheap", "Café", "food", "5", "out", "of", ".", ","])
texts = st.lists(words, min_size=1, max_size=12).map(" ".join)
groups = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=6)


def oracle():
    """The file of official values for the whole test set, and the references; None where they are not here."""
    data = os.environ.get("RANKWISE_DATA", "")
    file = os.environ.get("RANKWISE_E2E_ORACLE") or (data and str(Path(data).parent / "oracles" / "e2e.json"))
    test = Path(data or ".") / "e2e" / "test.parquet"
    return (Path(file), test) if data and Path(file).is_file() and test.is_file() else None


def test_the_function_is_an_attribute_of_the_package_and_its_file_a_module():
    assert rankwise.metrics.e2e is e2e
    assert sys.modules["rankwise.metrics.e2e"].e2e is e2e


@pytest.mark.parametrize("name", SMALL["sets"])
def test_bleu_and_nist_of_small_sets_are_the_official_ones(name):
    hypotheses, expected = SMALL["sets"][name]["hypotheses"], SMALL["sets"][name]["expected"]
    assert bleu(hypotheses, SMALL["references"]) == pytest.approx(expected["bleu"], abs=1e-4)
    assert nist(hypotheses, SMALL["references"]) == pytest.approx(expected["nist"], abs=1e-4)


def corpus_bleu(hypotheses, references):
    """By sacrebleu's function for whole sets, which takes the first references, then the second ones, …"""
    longest = max(map(len, references))
    columns = [[group[i] if i < len(group) else None for group in references] for i in range(longest)]
    return min(sacrebleu.BLEU(lowercase=True, force=True).corpus_score(hypotheses, columns).score, 100.0)


answered = st.lists(
    st.tuples(st.one_of(texts, st.just("")), st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(answered)
def test_the_statistics_of_texts_add_up_to_the_bleu_of_the_set(pairs):
    hypotheses, references = (list(side) for side in zip(*pairs, strict=True))
    expected = corpus_bleu(hypotheses, references)
    found = bleu_statistics(hypotheses, references)
    assert found.shape == (len(pairs), 10)
    assert bleu(hypotheses, references) == bleu_of(found.sum(axis=0)) == expected
    several = bleu_of(np.stack([found.sum(axis=0), 2.0 * found.sum(axis=0), found[0]]))
    assert several.tolist() == [
        *(expected, corpus_bleu(hypotheses * 2, references * 2), corpus_bleu(hypotheses[:1], references[:1]))
    ]


def test_a_bootstrap_of_statistics_is_one_of_texts():
    references = SMALL["references"]
    ours, theirs = (np.array(given["hypotheses"]) for given in list(SMALL["sets"].values())[:2])

    def score(drawn, rows):
        return corpus_bleu(drawn.tolist(), [references[row] for row in rows])

    counted = [bleu_statistics(given.tolist(), references) for given in (ours, theirs)]
    with bootstrap.few():
        expected = bootstrap.by_hand(score, [ours, theirs], [theirs], np.arange(len(references)))
        assert expected[0] < expected[1]
        assert paired_bootstrap(bleu_of, counted, counted[1:]) == pytest.approx(expected)


@java
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.large] * (name == "poor")) for name in SMALL["sets"]]
)
def test_all_five_of_small_sets_are_the_official_ones(name):
    scores = e2e(hypotheses=SMALL["sets"][name]["hypotheses"], references=SMALL["references"])
    assert scores == pytest.approx(SMALL["sets"][name]["expected"], abs=1e-4)


@java
@pytest.mark.skipif(oracle() is None, reason="RANKWISE_DATA has no e2e/test.parquet with ../oracles/e2e.json beside it")
@pytest.mark.parametrize(
    "name",
    [
        "first_reference",
        *(
            pytest.param(name, marks=pytest.mark.large)  # Java takes long for each
            for name in ("shuffled_other", "template", "dropped_words", "swapped_words", "lower_no_punct")
        ),
    ],
)
def test_all_five_of_630_outputs_are_the_official_ones(name):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [bench]")
    file, test = oracle()
    known = json.loads(file.read_text(encoding="utf-8"))["sets"][name]
    groups: dict[str, list[str]] = {}
    for row in parquet.read_table(test).to_pylist():
        groups.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    assert (len(groups), sum(map(len, groups.values()))) == (630, 4693)
    assert e2e(known["hypotheses"], list(groups.values())) == pytest.approx(known["expected"], abs=1e-4)


@java
def test_no_output_moves_the_others_away_from_their_references():
    # Java takes each of these marks for the end of a line; the tokenizer gives back one line for each that it reads
    odd = ["", "A pub\u2028 by\x85 the\r\n\x0b\x0c river.\u2029", "...", "Café № ½ 🍕 | \u00a0 ||| x|||y\n", ""]
    tidy = ["", "A pub by the river.", "...", "Café № ½ 🍕 | ||| x|||y", ""]
    references = [["A pub by the river."]] * 5
    cut, wanted = module._ptb(*module._texts(odd, references))
    assert (cut, wanted) == module._ptb(tidy, references)
    assert wanted == [["a pub by the river"]] * 5
    assert cut[:3] == ["", "a pub by the river", ""] and cut[4] == ""


@java
@pytest.mark.large
def test_an_empty_output_scores_nothing():
    assert e2e(["", ""], [["A pub."], ["By the river."]]) == dict.fromkeys(
        ("bleu", "nist", "meteor", "rouge_l", "cider"), 0.0
    )


@given(groups)
def test_perfect_outputs_have_bleu_100(pairs):
    references = [[*group, "a place of at least four words"] for _, group in pairs]
    assert bleu([group[-1] for group in references], references) == pytest.approx(100.0)


@given(groups)
def test_scores_know_no_case_and_no_order(pairs):
    hypotheses, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    turned = [group[::-1] for group in references][::-1]
    for metric, most in ((bleu, 100.0), (nist, math.inf)):
        value = metric(hypotheses, references)
        assert 0.0 <= value <= most
        assert metric([text.upper() for text in hypotheses], references) == pytest.approx(value)
        assert metric(hypotheses[::-1], turned) == pytest.approx(value)
        assert metric([f" {text}\n" for text in hypotheses], references) == value


def plain_nist(hypotheses, references):
    """NIST-5 by its definition, one n-gram after the other."""
    cut = [
        [text.lower().split() for text in (hypothesis, *group)]
        for hypothesis, group in zip(hypotheses, references, strict=True)
    ]
    everything = [text for _, *group in cut for text in group]

    def appears(gram, text):
        return sum(tuple(text[i : i + len(gram)]) == gram for i in range(len(text) - len(gram) + 1))

    total = 0.0
    for n in range(1, 6):
        gained, made = 0.0, 0
        for hypothesis, *group in cut:
            grams = [tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1)]
            made += len(grams)
            for gram, count in Counter(grams).items():
                shared = min(count, max(appears(gram, text) for text in group))
                if shared:
                    before = sum(len(t) if n == 1 else appears(gram[:-1], t) for t in everything)
                    gained += shared * math.log2(before / sum(appears(gram, t) for t in everything))
        total += gained / made if made else 0.0
    length = sum(len(hypothesis) for hypothesis, *_ in cut)
    ratio = length / sum(sum(map(len, group)) / len(group) for _, *group in cut)
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(min(1.0, ratio)) ** 2)


@settings(max_examples=50)
@given(groups)
def test_nist_is_its_definition(pairs):
    hypotheses, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert nist(hypotheses, references) == pytest.approx(plain_nist(hypotheses, references), abs=1e-9)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "no hypotheses"),
        (["a"], [], "1 hypotheses and 0 groups"),
        (["a", "b"], [["a"]], "2 hypotheses and 1 groups"),
        (["a", "b"], [["a"], []], "hypothesis 1 has no references"),
        (["a", "b"], [["a"], ["b", " \n"]], "hypothesis 1 has a reference without text"),
        (["a"], ["a"], "references of hypothesis 0 are one text"),
        ("a", [["a"]], "not one text"),
        ([None], [["a"]], "hypothesis 0 is NoneType"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(hypotheses, references, message):
    for metric in (e2e, bleu, nist):
        with pytest.raises(InputError, match=message) as caught:
            metric(hypotheses, references)
        assert "\n" not in str(caught.value)


def program(folder, monkeypatch, text):
    """A `java` that is first on the PATH, a shell script; where it says $JAVA the real one stands."""
    file = folder / "java"
    file.write_text(f"#!/bin/sh\n{text}\n".replace("$JAVA", shutil.which("java") or "false"))
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_without_java_three_metrics_are_missing_and_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    hypotheses = SMALL["sets"]["close"]["hypotheses"]
    scores = e2e(hypotheses, SMALL["references"])
    assert scores == {"bleu": bleu(hypotheses, SMALL["references"]), "nist": nist(hypotheses, SMALL["references"])}
    assert re.fullmatch(r"METEOR, ROUGE-L and CIDEr need a Java runtime.+no java on the PATH", unavailable())


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for java")
def test_a_java_that_does_not_start_is_no_java(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "echo 'Unable to locate a Java Runtime.' >&2; exit 1")
    assert unavailable().endswith("does not start: Unable to locate a Java Runtime.")
    assert e2e(["a pub"], [["a pub"]]).keys() == {"bleu", "nist"}


@java
@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for java")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        # the tokenizer fails; says too little; METEOR fails at once; in the middle; hangs; talks nonsense
        ("case $* in *-version*) ;; *) echo 'no memory' >&2; exit 3;; esac", "tokenizer .* status 3: no memory"),
        ("case $* in *-version*) ;; *) echo one;; esac", "returned 1 lines for 4 texts"),
        ('case $* in *meteor*) exit 4;; *) exec $JAVA "$@";; esac', "METEOR .* status 4: it said nothing"),
        (
            "case $* in *meteor*) read l; echo 1; echo 'Error: heap' >&2; echo '\tat x' >&2; exit 5;; "
            '*) exec $JAVA "$@";; esac',
            "METEOR .* status 5: Error: heap",
        ),
        ('case $* in *meteor*) exec sleep 600;; *) exec $JAVA "$@";; esac', "METEOR .* within 5 s"),
        ('case $* in *meteor*) exec yes pub;; *) exec $JAVA "$@";; esac', "METEOR .* answered 'pub'"),
        pytest.param(
            "case $* in *-version*) ;; *) exec sleep 600;; esac",
            "tokenizer .* within 5 s",
            marks=pytest.mark.large,
        ),
    ],
)
def test_a_java_that_fails_gives_one_line(tmp_path, monkeypatch, script, message):
    program(tmp_path, monkeypatch, script)
    monkeypatch.setattr(module, "_patience", lambda texts: 5)
    with pytest.raises(InputError, match=message) as caught:
        e2e(["a pub", "by the river"], [["a pub"], ["by the river"]])
    assert "\n" not in str(caught.value)
