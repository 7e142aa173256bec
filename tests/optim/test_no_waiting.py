"""A step reads no value of a tensor: on a GPU that would wait for all work queued there.

Tensors of the meta device have no values, so that whatever reads one fails, as does a copy of it to the CPU. A copy to
that device, which a GPU also waits for, fails by `NoCopies`. Rows have no mask, since transformers looks whether it has
a 0.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerControl, TrainerState, TrainingArguments

import models
from methods import OWN, by_turns, method
from rankwise.train.callback import MethodCallback

SEARCHES = {
    "adalora": {"total": 10_000, "start": 1000, "settle": 1000, "every": 100},
    **dict.fromkeys(("fat-lora", "simplex-lora", "squeeze"), {"every": 100}),
    "weight-lora": {"every": 100, "start": 2},
}
"""With no rank change in the first steps."""


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kinds = [
            {each.device.type for each in tree_leaves(values) if isinstance(each, torch.Tensor) and each.dim()}
            for values in ((args, kwargs), out)
        ]
        assert len(set.union(*kinds)) <= 1, f"{func} copies between {kinds}"
        return out


def options(name):
    variants = [{}]
    if name in ("simplex-lora", "fat-lora"):
        variants += [{"projection": kind, "omega_rate": 0.1} for kind in ("softmax", "simplex")]
    if name == "sora":
        variants += [{"gate_rule": "adamw"}]
    return variants


@by_turns("name", OWN, ["bert", "llama"])
def test_a_step_of_every_method_reads_no_value(name, shape, tmp_path):
    for more in options(name):
        chosen = method(name, **SEARCHES.get(name, {}), **more)
        model = chosen.attach(models.model(shape), head=models.head(shape)).to("meta").train()
        optimizer = chosen.optimizer(model, TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True))
        optimizer.silence.warned = True  # it reads gradients until each site has had one
        batch = {key: value.to("meta") for key, value in models.batch().items() if key != "attention_mask"}
        callback, state = MethodCallback(chosen), TrainerState(global_step=1, max_steps=100)
        with NoCopies():
            for step in (1, 2, 3):
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                state.global_step = step
                callback.on_step_end(None, state, TrainerControl(), optimizer=optimizer)
        assert optimizer.steps == 3


def test_reading_a_value_fails_there():
    x = torch.ones(3, device="meta")
    for read in (torch.Tensor.tolist, torch.Tensor.nonzero, lambda x: bool(x.any()), torch.Tensor.cpu):
        with pytest.raises(RuntimeError):
            read(x)
    with NoCopies(), pytest.raises(AssertionError, match="copies between"):
        torch.ones(3).to("meta")
