"""PEFT's hot swap between two adapters of one budget with different ranks, in each layout."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import models
import rankwise as rw
from rankwise.adapters.consumers import CONSUMERS

[HOTSWAP] = [consumer for consumer in CONSUMERS if "hotswap_adapter" in consumer.name]
RANKS = dict.fromkeys(("patterns", "compact", "portable"), ((2, 4, 6, 4), (6, 4, 1, 5)))  # at one budget
RANKS["gaps"] = ((0, 4, 0, 0), (0, 0, 4, 0))
REFUSALS = {"patterns": "Configs are incompatible: for alpha_pattern", "gaps": "unexpected keys"}


def adapter(layout: str, ranks: tuple[int, ...], folder: Path) -> Path:
    """An adapter of these ranks on the small BERT, saved in a layout."""
    torch.manual_seed(sum(ranks[:1]))
    model = rw.LoRA(rank=4, targets=["query", "value"]).attach(models.model("bert"))
    for site in rw.sites(model):
        torch.nn.init.normal_(site.B)
    rw.resize(model, {site.name: rank for site, rank in zip(rw.sites(model), ranks, strict=True)})
    if layout == "patterns":
        model.save_pretrained(folder)
        return folder
    return rw.save(model, folder, layout=None if layout == "gaps" else layout)


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(models.model("bert"), folder).eval()


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "padded for compiling"])
@pytest.mark.parametrize("layout", RANKS)
def test_a_swap_is_right_or_refused_or_known_to_be_wrong(layout: str, compiled: bool, tmp_path: Path) -> None:
    first, second = (adapter(layout, ranks, tmp_path / str(place)) for place, ranks in enumerate(RANKS[layout]))
    model = loaded(first)
    if compiled:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    try:
        hotswap_adapter(model, str(second), "default")
    except (ValueError, RuntimeError) as error:
        assert REFUSALS[layout] in str(error)
        found = "refused"
    else:
        right = torch.allclose(models.logits(model), models.logits(loaded(second)), atol=1e-5)
        found = "right" if right else "wrong"
    assert found == HOTSWAP.reads(layout)
