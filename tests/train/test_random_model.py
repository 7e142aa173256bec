"""Small models of random weights: their words are the task's, and each kind serves the families that it can."""

import pytest
import torch
from datasets import Dataset

from rankwise import tasks
from rankwise.errors import InputError
from rankwise.tasks import Split, Task, subset
from rankwise.tasks.base import Evaluation
from rankwise.tasks.generation import Generation, Judged
from rankwise.train.model import build
from rankwise.train.random_model import CONFIGS, ENCODERS

ROWS = [(f"say the word {word}", f"the word is {word}") for word in ("blue", "coffee", "ünïcode", "shop")] * 6


class Words(Generation):
    """Rows of a few words; no name, so that it is no task of rankwise."""

    name = "words"
    main = "length"
    metrics = ("length",)

    def train(self) -> Split:
        columns = {"source": [a for a, _ in ROWS], "target": [b for _, b in ROWS], "idx": list(range(len(ROWS)))}
        return Split("train", Dataset.from_dict(columns), False, "made up")

    def evaluation(self) -> list[Split]:
        return [subset(self.train(), 4)]

    def score_texts(self, hypotheses: list[str], split: Split) -> Judged:
        lengths = [float(len(text)) for text in hypotheses]
        return Judged({"length": sum(lengths) / len(lengths)}, lengths)


def task(name: str) -> Task:
    return Words(target_length=8, beams=2) if name == "words" else tasks.build(name)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_word_of_the_rows_can_be_read_and_written(name: str) -> None:
    _, tokenizer, _ = build("random-t5" if name in ENCODERS else name, task("words"), 16)
    for _, text in ROWS[:4]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    unseen = "日本語 and <tags>"
    assert tokenizer.decode(tokenizer(unseen, add_special_tokens=False)["input_ids"]) == unseen


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_each_of_them_classifies_and_padding_does_not_matter(name: str) -> None:
    kind = task("stdlib-kind")
    few = subset(kind.train(), 40)
    model, tokenizer, head = build(name, kind, 32, few)
    assert head and model.config.num_labels == 3
    split = subset(kind.evaluation()[0], 6)
    evaluation = Evaluation(split, kind.encode(split, tokenizer, 32))
    at_once, singly = (kind.evaluate(model, evaluation, tokenizer, size, True).rows["logits"] for size in (6, 1))
    torch.testing.assert_close(torch.tensor(at_once.to_pylist()), torch.tensor(singly.to_pylist()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["random-gpt2", "random-llama", "random-t5"])
def test_the_others_write(name: str) -> None:
    words: Words = task("words")  # type: ignore[assignment]
    model, tokenizer, head = build(name, words, 16)
    assert head == []
    split = words.evaluation()[0]
    evaluation = Evaluation(split, words.encode(split, tokenizer, 16))
    scored = words.evaluate(model, evaluation, tokenizer, 4, final=True)
    assert set(scored.metrics) == {"loss", "length"}
    loss = model(**words.collate(model, tokenizer, 0)([evaluation.examples[0]])).loss
    assert torch.isfinite(loss) and loss.requires_grad


def test_a_model_that_cannot_write_is_refused() -> None:
    with pytest.raises((InputError, ValueError)) as caught:
        model, tokenizer, _ = build("random-bert", task("words"), 16)
        task("words").collate(model, tokenizer, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"max_length 600 \+ end token 1 \+ target_length 8 = 609: more than the 512 tokens"
    ):
        build("random-gpt2", task("words"), 600)


def test_the_weights_follow_the_random_stream_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build("random-gpt2", task("words"), 16)[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))
