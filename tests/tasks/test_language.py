"""Rows of tokens of which some are learnt: batches, loss, perplexity, samples, and plain text in blocks."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from asserts import refused
from chats import model_for, tokenizer_for, turns, write
from rankwise import methods, tasks
from rankwise.errors import NotFiniteError
from rankwise.metrics import METRICS, worth
from rankwise.tasks import Evaluation
from rankwise.tasks.generation import IGNORE
from rankwise.tasks.language import LONGEST_SAMPLE, SAMPLES

TEXTS = [
    f"The number {n} comes after {n - 1}, and {'it is even' if n % 2 == 0 else 'it is odd'}." for n in range(1, 41)
]


def conversations(folder: Path) -> Any:
    rows = [
        {"messages": turns(f"What is {n} + {n}?", f"It is {n + n}.", *["And?", "No."] * (n % 3))} for n in range(60)
    ]
    return tasks.build({"name": "chat", "dataset": str(write(folder / "sums.jsonl", rows))})


def texts(folder: Path, rows: list[str] = TEXTS) -> Any:
    return tasks.build({"name": "text", "dataset": str(write(folder / "texts.jsonl", [{"text": row} for row in rows]))})


def parts(task: Any, length: int = 64, **more: Any) -> Any:
    tokenizer = tokenizer_for(task)
    split = task.train()
    return model_for(tokenizer, **more).eval(), tokenizer, Evaluation(split, task.encode(split, tokenizer, length))


@pytest.mark.parametrize("kind", [conversations, texts])
def test_a_batch_is_padded_on_the_right_and_its_loss_is_that_of_the_learnt_tokens(tmp_path, kind):
    task = kind(tmp_path)
    model, tokenizer, evaluation = parts(task, 60)
    rows = [evaluation.examples[place] for place in (0, 5, len(evaluation.examples) - 1)]
    batch = task.collate(model, tokenizer, seed=0)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for place, row in enumerate(rows):
        length = row["length"]
        assert batch["input_ids"][place, :length].tolist() == row["input_ids"]
        assert batch["labels"][place].tolist() == row["labels"] + [IGNORE] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][place].sum() == length == batch["attention_mask"][place, :length].sum()
        assert row["labels"][0] == IGNORE and set(row["labels"]) - {IGNORE} <= set(row["input_ids"])
    wanted = [loss for row in rows for loss in by_hand(model, row)[0]]
    assert model(**batch).loss.item() == pytest.approx(np.mean(wanted), rel=1e-4)


def by_hand(model: Any, row: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """The loss of each token that a row learns, and whether it is the likeliest, without a batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    learnt = [place for place, label in enumerate(row["labels"]) if label != IGNORE]
    losses = [-logits[place - 1, row["labels"][place]].item() for place in learnt]
    return losses, [logits[place - 1].argmax().item() == row["labels"][place] for place in learnt]


@pytest.mark.parametrize("kind", [conversations, texts])
def test_scores_are_means_over_all_learnt_tokens_whatever_the_batches(tmp_path, kind):
    task = kind(tmp_path)
    model, tokenizer, evaluation = parts(task, 60)
    found = [by_hand(model, row) for row in evaluation.examples]
    losses, right = (np.array([*itertools.chain(*each)]) for each in zip(*found, strict=True))
    for size, final in ((1, False), (7, True), (1000, False)):
        model.train()
        scored = task.evaluate(model, evaluation, tokenizer, size, final)
        assert model.training
        wanted = {"loss": losses.mean(), "perplexity": np.exp(losses.mean()), "token_accuracy": right.mean()}
        assert scored.metrics == pytest.approx(wanted, rel=1e-4)
        statistics = np.array(scored.rows["statistics"].to_pylist())
        assert METRICS[task.main].value(statistics.sum(axis=0)) == pytest.approx(scored.metrics["perplexity"])
        assert statistics == pytest.approx(np.array([[sum(row), len(row)] for row, _ in found]), rel=1e-4)
    assert worth("perplexity", 2.0) > worth("perplexity", 3.0) and worth("token_accuracy", 0.5) > worth(
        "token_accuracy", 0.4
    )


def test_samples_are_the_likeliest_answers_to_the_conversation_before_its_last_answer(tmp_path):
    task = conversations(tmp_path)
    model, tokenizer, evaluation = parts(task, 1_000)
    rows = task.evaluate(model, evaluation, tokenizer, 16, final=True).rows
    shown = [row for row in rows.to_pylist() if row["prediction"] is not None]
    assert len(shown) == SAMPLES and [row["idx"] for row in shown] == sorted({row["idx"] for row in shown})
    conversation = {row["idx"]: row for row in evaluation.split.data}
    for row in shown:
        source = conversation[row["idx"]]["source"]
        assert source.partition(": ")[2].partition("\n")[0] in row["source"] and row["source"].endswith("assistant")
        [right] = row["references"]
        assert conversation[row["idx"]]["conversation"].count(right) >= 1 and right.endswith(".")
        ids = tokenizer(row["source"] + "\n", add_special_tokens=False)["input_ids"]
        written: list[int] = []
        while len(written) < LONGEST_SAMPLE and tokenizer.eos_token_id not in written:
            written.append(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item())
        assert row["prediction"] == tokenizer.decode(written, skip_special_tokens=True).strip()
    assert task.evaluate(model, evaluation, tokenizer, 16, final=False).rows["prediction"].null_count == len(rows)


def test_samples_fit_the_model_and_stop_at_the_token_that_ends_a_turn(tmp_path):
    """The end of a turn may be another token than the tokenizer's own, as with Gemma."""
    task = conversations(tmp_path)
    tokenizer = tokenizer_for(task)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '<end_of_turn>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    split = task.train()
    evaluation = Evaluation(split, task.encode(split, tokenizer, 64))
    model = model_for(tokenizer, max_position_embeddings=64)
    head = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 0.0)
    with torch.no_grad():
        head.bias[end] = 1.0
    model.lm_head = head  # writes the end of the turn at once
    rows = task.evaluate(model, evaluation, tokenizer, 16, final=True).rows.to_pylist()
    assert {row["prediction"] for row in rows} == {None, ""}


def test_samples_leave_room_for_virtual_tokens(tmp_path):
    task = conversations(tmp_path)
    _, tokenizer, evaluation = parts(task, 44)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    attached = methods.build({"name": "pre-embed", "prefix": 20, "infix": 0}).attach(model)
    rows = task.evaluate(attached, evaluation, tokenizer, 16, final=True).rows
    assert rows["prediction"].null_count == len(rows) - SAMPLES


def test_virtual_tokens_come_where_they_are_in_training(tmp_path):
    """An infix comes before the first answer, which only the labels show."""
    task = conversations(tmp_path)
    model, tokenizer, evaluation = parts(task, 200)
    attached = methods.build({"name": "pre-embed", "prefix": 2, "infix": 3}).attach(model).eval()
    batch = task.collate(attached, tokenizer, seed=0)([evaluation.examples[place] for place in range(20)])
    some = Evaluation(evaluation.split, evaluation.examples.select(range(20)))
    with torch.no_grad():
        wanted = attached(**batch).loss.item()
    scored = task.evaluate(attached, some, tokenizer, 20, True)
    assert scored.metrics["loss"] == pytest.approx(wanted, rel=1e-4)
    for row, prompt in zip(some.examples, scored.rows["source"].to_pylist(), strict=True):
        first = next(place for place, label in enumerate(row["labels"]) if label != IGNORE)
        assert prompt in (None, tokenizer.decode(row["input_ids"][:first]).strip())
    later = [np.flatnonzero(np.diff(np.flatnonzero(np.array(row["labels"]) != IGNORE)) > 1) for row in some.examples]
    assert any(map(len, later)) and scored.rows["source"].null_count == 20 - SAMPLES


def test_a_model_that_has_diverged_is_told(tmp_path):
    task = conversations(tmp_path)
    model, tokenizer, evaluation = parts(task)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(NotFiniteError, match="the loss is not finite"):
        task.evaluate(model, evaluation, tokenizer, 16, False)


def test_models_that_are_no_decoders_or_too_short_are_refused(tmp_path):
    task = conversations(tmp_path)
    model, tokenizer, evaluation = parts(task, 64, max_position_embeddings=32)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    assert refused(lambda: task.collate(t5, tokenizer, 0)) == (
        "chat needs a decoder (Llama, Qwen, …), not T5ForConditionalGeneration"
    )
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3
    )
    bert = transformers.BertLMHeadModel(config)
    assert "reads the tokens after the one that it predicts" in refused(lambda: task.collate(bert, tokenizer, 0))
    said = refused(lambda: task.check(model, tokenizer, evaluation.examples, "train"))
    assert said.startswith("a row of train has ") and said.endswith("tokens, more than the 32 of the model")


def test_an_encoder_decoder_is_refused_before_a_run(tmp_path, cli):
    for kind in (conversations, texts):
        task = kind(tmp_path)
        file = tmp_path / f"{task.name}.yaml"
        file.write_text(yaml.safe_dump({"task": {"type": task.name, "dataset": task.dataset}}))
        code, out, err = cli("validate", file, "model=random-t5")
        assert code == 2 and not out and err.count("\n") == 1
        assert f"is an encoder-decoder, but {task.name} needs a decoder (Llama, Qwen, …)" in err
        assert cli("validate", file, "model=random-llama", "max_length=512")[0] == 0
        code, _, err = cli("validate", file, "model=random-llama", "max_length=513")
        assert code == 2 and "max_length 513: more than the 512 tokens that LlamaForCausalLM reads" in err


WORDS = st.lists(
    st.text(st.sampled_from("ab é漢\n"), min_size=1).filter(str.strip), min_size=11, max_size=40, unique=True
)


@settings(max_examples=30)
@given(rows=WORDS, length=st.integers(4, 40))
def test_texts_follow_one_another_in_blocks_of_equal_length(tmp_path_factory, rows, length):
    task = texts(tmp_path_factory.getbasetemp(), rows + TEXTS)
    tokenizer, split = tokenizer_for(task), task.train()
    blocks = task.encode(split, tokenizer, length)
    end = tokenizer.eos_token_id
    stream = [*itertools.chain(*([*tokenizer(text)["input_ids"], end] for text in split.data["text"]))]
    found = [*itertools.chain(*blocks["input_ids"])]
    assert found == stream or found == stream[:-1]  # a single token at the end has nothing to be predicted from
    assert {*blocks["length"][:-1]} <= {length} and 1 < blocks["length"][-1] <= length
    assert all(row["labels"] == [IGNORE, *row["input_ids"][1:]] for row in blocks)
    assert task.kept(split, blocks) is split


def test_texts_of_all_files_are_the_same_and_an_empty_one_is_told(tmp_path):
    file = tmp_path / "texts.csv"
    file.write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    task = tasks.build({"name": "text", "dataset": str(file)})
    assert task.train().data["text"][:] == texts(tmp_path).train().data["text"][:]
    file.write_text("text,other\na,b\n ,c\n")
    assert refused(task.__class__(dataset=str(file)).train).startswith(f"{file} has an empty text in line 3")


def test_perplexity_has_no_overflow():
    value = METRICS["perplexity"].value
    assert value(np.array([[0.0, 3.0], [1e9, 1.0]])).tolist() == [1.0, math.inf]
