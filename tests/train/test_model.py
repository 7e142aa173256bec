"""Which modules of a loaded model are its head, what is refused, and that nothing is printed on the way."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import models
from rankwise import methods, tasks
from rankwise.errors import InputError
from rankwise.tasks import Task
from rankwise.train.model import build, check, label


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of four words, without padding, as decoders have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<end>": 0, "yes": 1, "no": 2, "<unknown>": 3}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unknown>", model_max_length=16)


def labelled(*names: str) -> Task:
    """A task whose classes have these names; none of its rows are read."""
    task = tasks.build("stdlib-kind")
    vars(task)["labels"] = names
    return task


def saved(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_embedded_model_has_a_classifier_and_keeps_its_pooler_frozen(capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = transformers_logging.get_verbosity()
    model, tokenizer, head = build(None, labelled("no", "yes"), 128)
    assert head == ["classifier"]
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.problem_type == "single_label_classification"
    assert tokenizer("a line")["input_ids"][0] == tokenizer.cls_token_id
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == verbosity


def test_a_pooler_drawn_at_random_belongs_to_the_head(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    folder = saved(BertModel(config, add_pooling_layer=False), words, tmp_path / "base")
    assert build(folder, labelled("a", "b", "c"), 8)[2] == ["bert.pooler", "classifier"]


def test_a_decoder_gets_a_padding_token_and_rows_do_not_depend_on_it(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    folder = saved(GPT2Model(config), words, tmp_path / "base")
    model, tokenizer, head = build(folder, labelled("a", "b"), 16)
    assert head == ["score"]
    assert tokenizer.pad_token == "<end>" and model.config.pad_token_id == 0
    model.eval()
    alone = model(**tokenizer("yes no", return_tensors="pt")).logits
    padded = model(**tokenizer(["yes no", "no yes no yes"], padding=True, return_tensors="pt")).logits[:1]
    torch.testing.assert_close(alone, padded)


def test_no_labels_means_one_output_trained_as_a_regression() -> None:
    model, _, _ = build(None, labelled(), 128)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"


def test_a_head_for_other_labels_is_drawn_anew(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = saved(models.model("bert"), words, tmp_path / "trained")
    model, _, head = build(folder, labelled("a", "b", "c", "d", "e"), 16)
    assert head == ["classifier"] and model.classifier.out_features == 5


def test_weights_in_half_precision_are_trained_in_fp32(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = saved(models.model("bert").to(torch.bfloat16), words, tmp_path / "half")
    model, _, _ = build(folder, labelled("a", "b", "c"), 16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_base_with_missing_weights_is_refused(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = saved(models.model("bert"), words, tmp_path / "base")
    config = AutoModel.from_pretrained(folder).config
    config.num_hidden_layers = 3
    config.save_pretrained(folder)
    with pytest.raises(InputError, match=r"no fitting weights for 16 parameters .*bert\.encoder\.layer\.2"):
        build(folder, labelled("a", "b", "c"), 16)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "someone/unknown-model"])
def test_a_model_that_cannot_be_had_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"model: there is no folder {name}") as caught:
        build(name, labelled("a", "b"), 16)
    assert "\n" not in str(caught.value)


def test_a_damaged_model_is_one_line(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = saved(models.model("bert"), words, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot load") as caught:
        build(folder, labelled("a", "b"), 16)
    assert "\n" not in str(caught.value)


def test_a_family_without_a_classifier_is_told_without_the_names_of_all_that_have_one(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = saved(AutoModelForCausalLM.from_config(models.small_config("granite")), words, tmp_path / "base")
    with pytest.raises(
        InputError, match=r"Unrecognized configuration class .*GraniteConfig.* AutoModelForSequenceClassification\.$"
    ):
        build(folder, labelled("a", "b"), 16)


def test_more_tokens_than_the_model_reads_are_refused() -> None:
    with pytest.raises(InputError, match="max_length 513: more than the 512 tokens"):
        build(None, labelled("a", "b"), 513)


@pytest.mark.parametrize("task", ["stsb", "camvid"])
def test_labels_that_are_no_classes_are_not_smoothed(task: str) -> None:
    with pytest.raises(InputError, match=f"label_smoothing: {task} is not trained with cross-entropy"):
        check(None, tasks.build(task), [methods.build({"name": "lora"})], 128, label_smoothing=0.1)
    check(None, tasks.build("mrpc"), [methods.build({"name": "lora"})], 128, label_smoothing=0.1)


def test_a_result_names_a_model_without_its_place(tmp_path: Path) -> None:
    assert label(None) == "minilm-l6"
    assert label("owner/name") == "owner/name"
    assert label(str(tmp_path)) == tmp_path.name
