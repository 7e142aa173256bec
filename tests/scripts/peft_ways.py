"""A pytest plugin that puts rankwise into the models of PEFT's own tests; `peft_conformance.py` loads it.

Each model that a test makes with `get_peft_model` and a LoraConfig gets fast layers and is changed as its way says,
right where a method's `attach` would. What a test does to the model afterwards is PEFT's own: merge, switch, add,
delete, save, load.
"""

import contextlib
import importlib.machinery
import inspect
import json
import re
import sys
import types
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

RECORD = pytest.StashKey[Any]()
state = types.SimpleNamespace(touched=0, refused=set(), way="stock")


def searching(model: Any) -> None:
    """ω on every site, and an optimizer that follows the model, as in the middle of a search."""
    from rankwise.ranks.replace import follow
    from rankwise.ranks.scales import Omega

    Omega.put_on(model)
    model.of_the_test = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    follow(model, model.of_the_test)


def resized(model: Any) -> None:
    """Every rank changed and changed back, every second one by way of a smaller rank."""
    from rankwise.ranks import resize, sites

    def other(place: int, rank: int, limit: int) -> int:
        if rank > limit:  # more than the layer can use: this rank could not come back
            return rank
        smaller = max(rank - 1, 1)
        return smaller if place % 2 or rank == limit else rank + 1

    before = {site.name: site.rank for site in sites(model)}
    resize(model, {site.name: other(place, site.rank, site.limit) for place, site in enumerate(sites(model))})
    resize(model, before)


def folded(model: Any) -> None:
    """A search that has moved ω and has ended."""
    from rankwise.ranks.fold import fold
    from rankwise.ranks.scales import Omega
    from rankwise.ranks.sites import omega

    Omega.put_on(model)
    weights = omega(model)
    assert weights is not None
    with torch.no_grad():
        weights.copy_(1 + torch.linspace(-0.2, 0.2, len(weights)))
    fold(model)


WAYS: dict[str, Callable[[Any], None] | None] = {
    "stock": None,
    "fast layers": None,
    "in a search": searching,
    "ranks changed and back": resized,
    "after a search": folded,
}


def changed(model: Any, config: Any) -> Any:
    """`model` as its way says, if it is LoRA's; what rankwise refuses about its layers is noted by name."""
    from peft import LoraConfig, PeftModel

    import rankwise as rw
    from rankwise.nets.lora_linear import set_fast
    from rankwise.ranks.peft_calls import MarkedConfig, allow_peft_calls
    from rankwise.ranks.peft_layers import lora_layers

    change = WAYS[state.way]
    if type(config) not in (LoraConfig, MarkedConfig):
        return model
    if not isinstance(model, PeftModel):
        state.refused.add("PeftMixedModel: no PeftModel around the layers")
        return model
    fast = set_fast(model)
    state.touched += bool(fast) if change is None else 1
    if change is None:
        return model
    allow_peft_calls(model)
    for name, _, why in lora_layers(model):
        if why:
            with pytest.raises(rw.InputError) as refused:
                rw.resize(model, {name: 1})
            state.refused.add(str(refused.value).removeprefix(f"{name} ").partition(", so its rank")[0])
    if rw.sites(model):
        try:
            change(model)
        except rw.InputError as error:
            state.refused.add(str(error))
    return model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--way", choices=[*WAYS])
    parser.addoption("--record", type=Path)
    parser.addoption("--stock", type=Path, help="what stock PEFT has passed; nothing else is run")


def pytest_configure(config: pytest.Config) -> None:
    import peft

    diffusers = types.ModuleType("diffusers")  # its pipelines come from the hub, so none of their tests can run
    diffusers.__dict__.update(StableDiffusionPipeline=object, __version__="0.30.0")
    diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    sys.modules["diffusers"] = diffusers
    state.way = config.getoption("way")
    config.stash[RECORD] = config.getoption("record").open("w")
    from tests import testing_utils  # type: ignore[attr-defined]  # PEFT's

    testing_utils.hub_online_once = lambda model: contextlib.nullcontext()  # it would try the network again and again
    import rankwise as rw

    get_peft_model, save_pretrained = peft.get_peft_model, peft.PeftModel.save_pretrained

    @wraps(get_peft_model)
    def made(model: Any, peft_config: Any, *args: Any, **options: Any) -> Any:
        return changed(get_peft_model(model, peft_config, *args, **options), peft_config)

    @wraps(save_pretrained)
    def saved(self: Any, folder: Any, *args: Any, **options: Any) -> None:
        # As users are told to: a search is no adapter, and PEFT's own files of it say that they are none.
        if state.way != "in a search" or args or options.keys() - {"safe_serialization"}:
            save_pretrained(self, folder, *args, **options)
            return
        trains, active = {name: p.requires_grad for name, p in self.named_parameters()}, self.active_adapter
        for name in self.peft_config:  # its default first, whose folder the others are in
            self.set_adapter(name)
            rw.save(self, Path(folder, "" if name == "default" else name))
        self.set_adapter(active)
        for name, p in self.named_parameters():
            p.requires_grad_(trains[name])

    if state.way != "stock":
        peft.get_peft_model, peft.PeftModel.save_pretrained = made, saved


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = config.getoption("stock") and {
        row["test"] for row in map(json.loads, config.getoption("stock").open()) if row["outcome"] == "passed"
    }
    items[:] = [item for item in items if (item.nodeid in passed if passed else about_lora(item))]


def about_lora(item: Any) -> bool:
    """Whether a test is about LoRA, in files that have tests of all types of adapter."""
    from peft import LoraConfig

    if item.path.name == "test_initialization.py":
        return item.cls is not None and item.cls.__name__ == "TestHotSwapping"
    if item.path.name != "test_custom_models.py":
        return True
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if "config_cls" in values:
        return values["config_cls"] is LoraConfig
    made = re.search(r"\bLoraConfig\(", inspect.getsource(item.function))
    return bool(made) or any(isinstance(value, LoraConfig) for value in values.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        reason = "" if report.outcome == "passed" else str(call.excinfo.value if call.excinfo else "")
        row = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "reason": f"{call.excinfo.typename}: {reason}" if call.excinfo else "",
            "where": str(report.longrepr)[-1500:] if report.outcome == "failed" else "",
            "touched": state.touched,
            "refused": sorted(state.refused),
        }
        print(json.dumps(row), file=item.config.stash[RECORD], flush=True)
    if call.when == "teardown":
        state.touched, state.refused = 0, set()
    return report
