"""Every registered method on the small models: how each is set up there, and what of it trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import rankwise as rw
from rankwise.methods import Method, build, registry
from rankwise.methods.peer import Peer

OPTIONS = {
    "adalora": {"rank": 2, "init_rank": 3, "start": 1, "settle": 2, "every": 1, "total": 7},
    "adapter-h": {"size": 2},
    "adapter-l": {"size": 2},
    "dora": {"rank": 2},
    "fat-lora": {"rank": 2, "every": 2, "times": 2, "omega_rate": 20.0},
    "full-top": {"blocks": 1},
    "lora": {"rank": 2},
    "lora-fa": {"rank": 2},
    "pissa": {"rank": 2},
    "pre-embed": {"prefix": 2, "infix": 1},
    "pre-layer": {"prefix": 2, "infix": 1},
    "random-lora": {"rank": 2, "keep": 3},
    "simplex-lora": {"rank": 2, "every": 2, "times": 2},
    "spaced-lora": {"rank": 2, "mean_rank": 0.5},
    "squeeze": {"rank": 3, "mean_rank": 0.7, "every": 2, "times": 2},
    "sora": {"rank": 3, "sparsity": 20.0, "gate_rate": 0.02, "gates": "normal"},
    "fourierft": {"frequencies": 5},
    "tinylora": {"entries": 4},
    "vb-lora": {"rank": 2, "vectors": 6, "length": 4},
    "vera": {"rank": 6},
    "weight-lora": {"rank": 2, "keep": 3, "start": 2, "every": 4},
}

# What trains, by the ends of names; the head apart.
FACTORS = r"\.lora_A\.default\.(weight|parametrizations\.weight\.original)$|\.lora_B\.default\.weight$"
OMEGA = r"^base_model\.lora_omega\.default$"
TRAINS = {
    "adalora": r"\.lora_[AEB]\.default$",
    "adapter-h": r"\.dense\.adapter\.(down|up)\.(weight|bias)$",
    "adapter-l": r"\.dense\.adapter\.(norm|down|up)\.(weight|bias)$",
    "bitfit": r"\.bias$",
    "dora": rf"{FACTORS}|\.lora_magnitude_vector\.default\.weight$",
    "fat-lora": f"{FACTORS}|{OMEGA}",
    "full": r"",
    "full-top": r"encoder\.layer\.1\.",
    "head": r"$^",
    "lora": FACTORS,
    "lora-fa": r"\.lora_B\.default\.weight$",
    "pissa": FACTORS,
    "pre-embed": r"virtual",
    "pre-layer": r"virtual",
    "random-lora": FACTORS,
    "simplex-lora": f"{FACTORS}|{OMEGA}",
    "spaced-lora": FACTORS,
    "squeeze": FACTORS,
    "sora": rf"{FACTORS}|\.lora_A\.default\.parametrizations\.weight\.0\.gates$",
    "fourierft": r"\.fourierft_spectrum\.default$",
    "ia3": r"\.ia3_l\.default$",
    "tinylora": r"\.tinylora_v\.",
    "vb-lora": r"vblora_(logits_[AB]|vector_bank)",
    "vera": r"\.vera_lambda_[bd]\.default$",
    "weight-lora": f"{FACTORS}|{OMEGA}",
}

METHODS = sorted(registry().keys() - {"none"})
"""Without `none`, which trains nothing: most promises are about training."""
OWN = [name for name in METHODS if not issubclass(registry()[name], Peer)]
"""Without those that are PEFT's layers and PEFT's files, in which nothing is ours."""
every_method = pytest.mark.parametrize("name", METHODS)
every_own_method = pytest.mark.parametrize("name", OWN)
every_shape = pytest.mark.parametrize("shape", models.SHAPES)
one_shape = pytest.mark.parametrize(
    "shape", [models.SHAPES[0], *(pytest.param(shape, marks=pytest.mark.large) for shape in models.SHAPES[1:])]
)
"""For what takes long: the other shapes are large."""


def by_turns(argument: str, values: Sequence[Any], shapes: Sequence[str] = models.SHAPES) -> pytest.MarkDecorator:
    """Each value at one shape, and each shape in its turn; the other pairs are large."""
    return pytest.mark.parametrize(
        (argument, "shape"),
        [
            pytest.param(value, shape, marks=[pytest.mark.large] if (turn - place) % len(shapes) else [])
            for turn, value in enumerate(values)
            for place, shape in enumerate(shapes)
        ],
    )


def method(name: str, **more: object) -> Method:
    return build({"name": name, **OPTIONS.get(name, {}), **more})


def attached(name: str, shape: str = "bert") -> torch.nn.Module:
    torch.manual_seed(1)
    return method(name).attach(models.model(shape), head=models.head(shape))


def goes_on_bit_identically(
    start: Callable[[], tuple[torch.nn.Module, rw.SimplexAdam]], cut: int, folder: Path
) -> None:
    """Assert that a bare loop of 5 steps, cut after `cut` and resumed from `folder`, ends as an uncut one does."""
    model, optimizer = start()
    torch.manual_seed(5)
    losses = models.train(model, optimizer, cut)
    rw.save_checkpoint(folder, model, optimizer)
    losses += models.train(model, optimizer, 5 - cut, start=cut)
    resumed, optimizer = start()
    steps = rw.load_checkpoint(folder, resumed, optimizer)
    assert models.train(resumed, optimizer, 5 - steps, start=steps) == losses[cut:]
    a, b = model.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
