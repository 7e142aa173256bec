"""What a tokenizer, a configuration, weights and settings say of the same thing goes together, or is refused."""

from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset

import models
import rankwise as rw
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.nets.positions import skipped
from rankwise.tasks import Split, Task
from rankwise.tasks.agreement import agree
from rankwise.tasks.classification import logits

TEXTS = ("w1 w2 w3 w4", "w5 w6 w7 w8 w9 w10 w11 w12", "w13 w14 w15 w16 w17")


def task() -> Task:
    """Three classes; no rows of its own are read."""
    made = tasks.build("stdlib-kind")
    vars(made)["labels"] = ("a", "b", "c")
    return made


def split(*texts: str) -> Split:
    [column] = task().text
    rows = {column: list(texts), "label": [0] * len(texts), "idx": list(range(len(texts)))}
    return Split("train", Dataset.from_dict(rows), False)


def llama(**more: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = models.small_config("llama", **{"num_labels": 3, **more})
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def spread(model: torch.nn.Module, tokenizer: object, *texts: str) -> float:
    """How far the logits of texts side by side are from those of each alone."""
    examples = task().encode(split(*texts), tokenizer, 32)
    one, many = (logits(model, examples, tokenizer, size) for size in (1, len(texts)))
    return float(abs(one - many).max())


@pytest.mark.parametrize("said", [None, 0, 63])
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_pads_is_what_the_model_looks_for(said: int | None, side: str) -> None:
    """A tokenizer that has an end token only, and a configuration that says another token, a word or none at all."""
    model, tokenizer = llama(pad_token_id=said), models.tokenizer(ended=False, padding_side=side)
    task().collate(model, tokenizer, 0)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert spread(model, tokenizer, *TEXTS) < 1e-5


def test_the_padding_hides_no_last_token() -> None:
    """An end token pads only where there is no other token for it; padding spelled out in a text is text."""
    model, tokenizer = llama(pad_token_id=None), models.tokenizer("<s>", bos_token="<s>")
    agree(task(), model, tokenizer)
    assert tokenizer.pad_token == "<s>"
    model, tokenizer = llama(), models.tokenizer("<pad>", pad_token="<pad>")
    agree(task(), model, tokenizer)
    read = task().encode(split("w1 <pad>", "w1 w2"), tokenizer, 32)["input_ids"][:]
    assert read == [[1, 55, 55, 55, 54], [1, 2, 54]]  # three unknown words: <, pad and >


def test_padding_that_a_text_can_hold_gives_way_to_a_row_that_no_word_has() -> None:
    tokenizer = models.tokenizer(ended=False, eos_token="?", pad_token="?")
    agree(task(), llama(), tokenizer)
    assert tokenizer.pad_token_id == len(tokenizer) - 1 and tokenizer.pad_token != "?"
    full = models.tokenizer(*map(str, range(8)), ended=False, eos_token="?", pad_token="?")
    with pytest.raises(InputError, match="needs a padding token that cannot occur in texts"):
        agree(task(), llama(), full)
    bert = transformers.AutoModelForSequenceClassification.from_config(models.small_config("bert", num_labels=3))
    agree(task(), bert, full)  # which masks it


def test_a_word_that_positions_are_counted_without_is_refused() -> None:
    """RoBERTa skips what it was built to pad with, whatever the configuration says later."""
    tokenizer = models.tokenizer("<pad>", pad_token="<pad>")
    for kind, auto in (
        ("roberta", transformers.AutoModelForSequenceClassification),
        ("m2m_100", transformers.AutoModelForSeq2SeqLM),  # which selects positions and looks none up
    ):
        asked, built = task() if kind == "roberta" else tasks.build("samsum"), {}
        for number in (3, 56):
            config = models.small_config(kind, pad_token_id=number, num_labels=3)
            config.max_position_embeddings = 100
            built[number] = auto.from_config(config)
            assert skipped(built[number]) == {number}
        with pytest.raises(
            InputError, match=r"skips token 3 \('w3'\) .*its tokenizer pads with '<pad>': use the tokenizer that"
        ) as caught:
            agree(asked, built[3], tokenizer)
        assert "\n" not in str(caught.value)
        agree(asked, built[56], tokenizer)
        attached = rw.PreEmbed(prefix=9, infix=9).attach(built[3])
        if kind == "roberta":
            with pytest.raises(InputError, match="skips token 3"):
                agree(asked, attached, tokenizer)
        else:  # M2M100 reads embeddings then, and counts all of them
            assert skipped(attached) == set()
    bert = transformers.AutoModelForSequenceClassification.from_config(
        models.small_config("bert", pad_token_id=3, num_labels=3)
    )
    assert skipped(bert) == set()
    agree(task(), bert, tokenizer)


@pytest.mark.large
@pytest.mark.filterwarnings("ignore")
def test_no_classifier_says_other_things_in_a_batch() -> None:
    """Alone, in a batch, and as transformers reads a row that needs no padding."""
    same, refused = set(), {}
    auto = transformers.AutoModelForSequenceClassification
    for kind, model in models.every_model(auto, models.CLASSIFIERS, num_labels=3, eos_token_id=54, pad_token_id=0):
        tokenizers = [models.tokenizer("<pad>", pad_token="<pad>"), models.tokenizer("<s>", bos_token="<s>")]
        tokenizers += [models.tokenizer(pad_token=f"w{number}") for number in skipped(model)]
        for tokenizer in tokenizers:
            model.config.pad_token_id = 0  # a word
            try:
                task().collate(model, tokenizer, 0)
            except InputError as error:
                refused[kind] = str(error)
                continue
            assert spread(model, tokenizer, *TEXTS) < 1e-3, kind
            same.add(kind)
    assert len(same) > 80
    mixing = {kind for kind, reason in refused.items() if "depends on its padding" in reason}
    skipping = {kind for kind, reason in refused.items() if "skips token" in reason}
    assert skipping <= same
    assert skipping == {
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm"),
        *("xlm-roberta", "xlm-roberta-xl"),
    }
    assert mixing == {"canine", "convbert", "fnet", "mobilebert", "nystromformer", "yoso"}


def test_a_token_without_a_row_is_refused_before_training(tmp_path: Path) -> None:
    tokenizer = models.tokenizer("<pad>", pad_token="<pad>")
    tokenizer.add_tokens([f"new{number}" for number in range(20)])
    with pytest.raises(
        InputError, match=r"13 tokens, the first 'new7', beyond the 64 of LlamaForSequenceClassification"
    ):
        task().collate(llama(), tokenizer, 0)
    tokenizer = models.tokenizer("<pad>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{number}>" for number in range(9)]})
    collate = task().collate(llama(), tokenizer, 0)  # no text holds them but one that spells them
    examples = task().encode(split("w1", "w2 <image8>"), tokenizer, 32)
    with pytest.raises(InputError, match="row 1 of train holds '<image8>', token 65, but Llama"):
        task().check(llama(), tokenizer, examples, "train")
    with pytest.raises(InputError, match="row 1 of a batch holds"):
        collate(list(examples))


def test_an_end_mark_in_a_text_is_refused_where_it_is_looked_for() -> None:
    config = models.small_config("bart", num_labels=3, eos_token_id=54, pad_token_id=1)
    bart = transformers.AutoModelForSequenceClassification.from_config(config)
    tokenizer = models.tokenizer("<pad>", pad_token="<pad>")
    task().collate(bart, tokenizer, 0)
    examples = task().encode(split("w1 w2", "w1 </s> w2"), tokenizer, 32)
    with pytest.raises(InputError, match="row 1 of train holds '</s>', token 54, by which Bart"):
        task().check(bart, tokenizer, examples, "train")
    with pytest.raises(InputError, match="cannot read what its tokenizer returns for a text"):
        task().collate(bart, models.tokenizer("<pad>", pad_token="<pad>", ended=False), 0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_labels", 2, "has 2 outputs but stdlib-kind needs 3"),
        ("problem_type", "multi_label_classification", "is set to multi_label_classification"),
    ],
)
def test_a_head_for_something_else_is_refused(key: str, value: object, words: str) -> None:
    model = llama(**{key: value})
    with pytest.raises(InputError, match=words):
        task().collate(model, models.tokenizer("<pad>", pad_token="<pad>"), 0)


def test_positions_are_counted_with_all_that_stands_in_a_row() -> None:
    """RoBERTa has two fewer than its configuration says, and a decoder reads what it is to write."""
    roberta = models.small_config("roberta", pad_token_id=1, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(roberta)
    tokenizer = models.tokenizer(pad_token="w1")
    agree(task(), model, tokenizer, 38)
    with pytest.raises(
        InputError, match="max_length 39: more than the 38 tokens that RobertaFor.* reads; lower max_length"
    ):
        agree(task(), model, tokenizer, 39)
    writing = tasks.build({"name": "samsum", "target_length": 20})
    gpt2 = transformers.AutoModelForCausalLM.from_config(models.small_config("gpt2"))
    agree(writing, gpt2, tokenizer, 19)
    with pytest.raises(
        InputError, match=r"max_length 20 \+ end token 1 \+ target_length 20 = 41: more than the 40 tokens"
    ):
        agree(writing, gpt2, tokenizer, 20)
    bart = transformers.AutoModelForSeq2SeqLM.from_config(models.small_config("bart"))
    agree(writing, bart, tokenizer, 40)
    with pytest.raises(InputError, match="target_length 41: more than the 40 tokens that Bart.* writes"):
        agree(tasks.build({"name": "samsum", "target_length": 41}), bart, tokenizer, 40)


def test_nothing_random_is_drawn_and_the_mode_stays() -> None:
    model = llama(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    task().collate(model, models.tokenizer("<pad>", pad_token="<pad>"), 0)
    assert model.training and torch.equal(torch.get_rng_state(), state)
