"""`rw.lean`: less memory in anyone's loop, whether rankwise or PEFT made the model."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

import models
import rankwise as rw
from asserts import refused
from rankwise.nets import recomputed
from rankwise.nets.chunked_loss import Chunked, output_layer
from rankwise.nets.recomputed import Recomputing


def stock(**config: Any) -> Any:
    """A model with an adapter that PEFT has put there."""
    model = models.of_class("LlamaForCausalLM")
    assert model is not None
    config = {"r": 2, "lora_dropout": 0.1, "target_modules": "all-linear", **config}
    return models.stirred(peft.get_peft_model(model, peft.LoraConfig(**config))).train()


def trained(model: Any, autocast: torch.dtype | None = None, steps: int = 3) -> list[Tensor]:
    """The losses of a bare loop, and the adapter after it."""
    model.load_state_dict(stock().state_dict())
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**models.class_batch("LlamaForCausalLM")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in params)]


def test_a_stock_peft_model_trains_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed, "SMALL", 0)
    model = stock()
    expected = trained(model)
    rw.lean(model)
    chunked = output_layer(model).forward
    assert isinstance(chunked, Chunked) and isinstance(model.get_base_model().forward, Recomputing)
    found = trained(model)
    assert chunked.losses == 1 + 3 and chunked.whole_logits == 0  # one was tried out
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(found, expected, strict=True))
    rw.lean(model, on=False)
    assert not [part for part in model.modules() if "forward" in vars(part)]
    assert all(torch.equal(one, other) for one, other in zip(trained(model), expected, strict=True))
    rw.lean(model, on=False)  # once more


@pytest.mark.parametrize("fast", [False, True])
def test_an_adapter_more_precise_than_its_base_is_taken(fast: bool) -> None:
    """As PEFT keeps it on a base in bf16: losses and gradients are fp32, but not as precise."""
    model = models.of_class("LlamaForCausalLM").to(torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if fast:
        rw.fast(model)
    rw.lean(model)
    chunked = output_layer(model).forward
    model(**models.class_batch("LlamaForCausalLM")).loss.backward()
    assert chunked.losses == 2 and chunked.whole_logits == 0


def test_in_fp16_logits_are_whole_because_the_loss_is_scaled_up_later() -> None:
    model = stock()
    expected = trained(model, torch.float16)
    rw.lean(model)
    found = trained(model, torch.float16)
    assert output_layer(model).forward.losses == 1  # when it was tried out in fp32
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", ["bert", "t5"])
def test_a_model_that_writes_nothing_is_lean_too(shape: str) -> None:
    model: Any = rw.LoRA(rank=2).attach(models.model(shape), head=models.head(shape))
    rw.lean(model)
    assert isinstance(model.get_base_model().forward, Recomputing)
    rw.lean(bare := nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    assert isinstance(bare.forward, Recomputing)
    rw.lean(bare, on=False)
    assert "forward" not in vars(bare)


def test_what_it_cannot_do_is_refused_and_the_model_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "LlamaForCausalLM is compiled, and decides itself what it keeps: do not call lean"
    model = stock().get_base_model()
    model.compile(backend="eager")
    assert refused(lambda: rw.lean(model)) == line
    line = "OptimizedModule is compiled, and decides itself what it keeps: do not call lean"
    assert refused(lambda: rw.lean(torch.compile(stock(), backend="eager"))) == line
    line = "Sequential is compiled, and decides itself what it keeps: do not call lean"
    part = torch.compile(nn.Linear(3, 3), backend="eager")  # which no one would compile in a lean pass
    assert refused(lambda: rw.lean(nn.Sequential(part, nn.GELU()))) == line
    [(_, model)] = models.every_model(AutoModelForSeq2SeqLM, ["prophetnet"], pad_token_id=0, decoder_start_token_id=0)
    line = (
        "activation_memory: the loss of ProphetNetForConditionalGeneration cannot be computed in chunks: leave it out"
    )
    assert refused(lambda: rw.lean(model)) == line
    monkeypatch.setattr(recomputed, "_hooks_of_others", None)
    unchanged = stock()
    assert refused(lambda: rw.lean(unchanged)) == "activation_memory: lean needs torch 2.8 or newer"
    assert not [part for each in (model, unchanged) for part in each.modules() if "forward" in vars(part)]
