"""How many tokens a model has positions for: what it says when asked is what it does when run."""

import pytest
import torch
import transformers

import models
from rankwise.nets.positions import positions, table, token_table


def runs(model: transformers.PreTrainedModel, width: int) -> bool:
    """Whether the model reads a row of so many tokens."""
    ids = torch.full((1, width), 5)
    if model.config.eos_token_id is not None:
        ids[:, -1] = 6
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:
        return False
    return True


@pytest.mark.large
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_every_classifier_reads_as_many_tokens_as_it_is_said_to_have_positions_for() -> None:
    told, beyond = {}, set()
    for kind, model in models.every_model(
        transformers.AutoModelForSequenceClassification, models.CLASSIFIERS, eos_token_id=6
    ):
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        known = table(model)
        assert positions(skeleton) == positions(model), kind
        if known is not None and known <= models.POSITIONS and runs(model, 8):
            told[kind] = known
            assert runs(model, known), kind
            beyond |= {kind} if runs(model, known + 1) else set()
    assert len(told) > 30
    assert beyond == {"tapas"}  # whose further tokens all stand at the last position
    assert {told["bert"], told["gpt2"], told["opt"]} == {models.POSITIONS}
    assert told["roberta"] < models.POSITIONS


@pytest.mark.parametrize("kind", ["canine", "perceiver"])
def test_a_model_without_a_table_of_tokens_has_none(kind: str) -> None:
    """transformers raises NotImplementedError for the one, and gives the parameter of another table for the other."""
    config = models.small_config(kind)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert token_table(model) is None


def test_what_is_said_of_lengths_is_the_configurations_where_there_is_no_table() -> None:
    for kind, known in (("llama", models.POSITIONS), ("xlnet", None), ("t5", None)):
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(models.small_config(kind))
        assert table(model) is None and positions(model) == known
