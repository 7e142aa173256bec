"""LoRA (Hu et al. 2021, arXiv 2106.09685): h = W x + b + s B A x with s = α / r and the same rank everywhere.

In the paper A starts Gaussian, in its released code and in PEFT Kaiming uniform (`init: kaiming`). The three SVD starts
are from a course project on LoRA-FA with SVD initialisation:

    svd            B = U√S, A = √S Vᵀ of W truncated to rank r; W stays, so outputs change at the start
    svd_residual   the same, and W ← W - s B A, so outputs stay (as in PiSSA, arXiv 2404.02948); saving undoes it
    svd_authors    as in their notebooks, with columns of Vᵀ in place of rows; only to reproduce their figures
    pissa          PEFT's, which divides the singular values by s, so that s B A is the truncation of W itself
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel
from pydantic import Field
from torch import nn

from rankwise.errors import require
from rankwise.methods.base import Method
from rankwise.methods.targets import ALL_LINEAR, adapt, placement
from rankwise.ranks import sites
from rankwise.ranks.init_svd import svd_factors
from rankwise.ranks.kept import keep_start, start_of
from rankwise.ranks.layers import check_own_weight, shaped
from rankwise.ranks.peft_calls import allow_peft_calls

RESIDUAL = ("svd_residual", "pissa")
"""Starts that are subtracted from W."""
_PEFT_INIT: dict[str, Any] = {"normal": "gaussian", "pissa": "pissa"}


@dataclass(frozen=True)
class LoRA(Method, name="lora"):
    """Low-rank adapters of one rank on every target: A Kaiming uniform, B = 0.

    Attributes:
        rank: r, of every site.
        alpha: α; the product BA is scaled by s = α / r.
        targets: `all-linear` (every linear layer except the output head), or names of modules, matched by their ends.
            `c_attn.q`, `c_attn.k` and `c_attn.v` are the parts of GPT-2's fused projection. Convolutions must be named.
        dropout: share of the adapter's inputs that are zeroed in training.
        init: the start of A, `kaiming` (uniform) or `normal` with B = 0, or of both factors: `svd`, `svd_residual`,
            `svd_authors`, `pissa`.
        pull: α_reg of the penalty α_reg ‖B - B0‖²_F, summed over the sites, which pulls B to its start. It is added
            after the clipping of gradients.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: str | list[str] = ALL_LINEAR
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init: Literal["kaiming", "normal", "svd", "svd_residual", "svd_authors", "pissa"] = "kaiming"
    pull: Annotated[float, Field(ge=0)] = 0.0

    peft_options: ClassVar[dict[str, Any]] = {}
    """More options for PEFT's LoraConfig."""
    sizes: ClassVar[tuple[str, ...]] = ("rank",)
    keeps_ranks: ClassVar[bool] = True
    """Whether every site keeps its rank. A site that loses it could not undo what its start subtracted from W."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keeps_ranks:
            allowed = self.init in ("kaiming", "normal")
            require(allowed, f"{self.name} changes ranks: init must be kaiming or normal, not {self.init}")
            require(self.pull == 0, f"{self.name} changes ranks: pull must be 0, not {self.pull}")

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        placed = placement(model, self.targets, head, self.rank, only=self.linear_only)
        for name in placed["target_modules"] if self.init in RESIDUAL else ():
            check_own_weight(model, name)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            lora_dropout=self.dropout,
            **placed,
            init_lora_weights=_PEFT_INIT.get(self.init, True),
            **self.peft_options,
        )
        model = adapt(model, config)
        self._start(model)
        allow_peft_calls(model)
        return model

    @torch.no_grad()
    def _start(self, model: PeftModel) -> None:
        """Set the factors to their start, unless PEFT has."""
        if self.init in ("kaiming", "normal"):
            return
        residual, by_peft = self.init in RESIDUAL, self.init == "pissa"
        for site in sites(model):
            if not by_peft:
                A, B = svd_factors(site.W, self.rank, authors=self.init == "svd_authors")
                site.A.copy_(shaped(A, site.A))
                site.B.copy_(shaped(B, site.B))
            if residual or self.pull:
                A, B = site.A.flatten(1), site.B.flatten(1)
                keep_start(site, A if residual else None, B, subtracted=by_peft)
        # Only once, not again for an adapter that is added with the same configuration.
        config: Any = model.peft_config[model.active_adapter]
        config.init_lora_weights = True

    def before_step(self, model: nn.Module) -> None:
        for site in sites(model) if self.pull else ():
            if site.present and site.B.grad is not None:
                start, B = start_of(site), site.B.detach()
                site.B.grad.add_(B if start is None else B - shaped(start.B, B), alpha=2 * self.pull)

    @property
    def linear_only(self) -> str:
        """The option in use that PEFT has only for linear layers, not for convolutions; or an empty string."""
        return "init=pissa" if self.init == "pissa" else ""

    @property
    def exact_start(self) -> bool:
        # With a residual start W x + s B A x is the old W x only up to rounding.
        return self.init in ("kaiming", "normal")
