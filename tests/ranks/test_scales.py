"""A new kind of scale needs only its class, also when sites are emptied and get rank again."""

import sys
from collections.abc import Mapping

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import models
import rankwise as rw
from rankwise.conformance import models as small
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.replace import replace, sort_groups
from rankwise.ranks.scales import Scale, copy_scale, put_scale
from rankwise.ranks.sites import Site


class Share(Scale):
    """One parameter of its own for each site."""

    def __init__(self) -> None:
        super().__init__()
        self.share: nn.Parameter | None
        self.register_parameter("share", None)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.parameter

    @property
    def parameter(self) -> nn.Parameter:
        assert self.share is not None
        return self.share

    def copy_for(self, adapter: str) -> "Share":
        scale = Share()
        scale.share = nn.Parameter(self.parameter.detach().clone())
        return scale

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        for site in sites(model):
            if site.present:
                cls._put(model, site)
        sort_groups(model)

    @classmethod
    def put_on_refilled(cls, model: PeftModel, site: Site) -> None:
        cls._put(model, site)

    @classmethod
    def _put(cls, model: nn.Module, site: Site) -> None:
        scale = cls()
        replace(model, scale, "share", torch.ones((), device=site.B.device), scale=True)
        put_scale(site, scale)

    def remove_parameter(self, model: nn.Module) -> None:
        replace(model, self, "share", None)

    @classmethod
    def is_in(cls, state: Mapping[str, Tensor], prefix: str, model: PeftModel) -> bool:
        return any(name.endswith(".share") for name in state)


def test_a_scale_with_a_parameter_for_each_site_goes_and_comes_with_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sys.modules["rankwise.ranks.resize"]
    monkeypatch.setattr(engine, "KINDS", (*engine.KINDS, Share))
    model = models.adapted(rank=2)
    Share.put_on(model)
    method = rw.LoRA(rank=2)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    small.train(model, optimizer, 2)
    first, *others = ranks(model)

    def stepped() -> set[int]:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    for rank in (0, 3, 0, 2):
        rw.resize(model, RankPlan({first: rank}))
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert stepped() == trained, f"rank {rank}"
        shares = [name for name, _ in model.named_parameters() if name.endswith(".share")]
        assert len(shares) == len(others) + (rank > 0)
        assert set(map(id, optimizer.state)) <= trained
        small.train(model, optimizer, 1)
    assert ranks(model)[first] == 2


def test_another_adapter_gets_a_frozen_copy_of_a_scale() -> None:
    model = models.adapted(rank=2)
    Share.put_on(model)
    model.add_adapter("copy", model.peft_config["default"])
    for value, site in enumerate(sites(model)):
        with torch.no_grad():
            site.scale.parameter.fill_(value)  # type: ignore[union-attr]
        copy_scale(site, "copy")
        copied = Site(site.name, site.layer, "copy").scale
        assert isinstance(copied, Share) and copied.value == value and not copied.parameter.requires_grad
        assert copied.parameter is not site.scale.parameter  # type: ignore[union-attr]
