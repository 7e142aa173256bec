"""Several runs in one forward pass of the base that they share, next to one after the other: is it worth a feature?

`benchmarks/suite.py` runs it as the parts together-bert and together-llama. Runs of one model with the same batches
differ in rate and seed. Their rows go through the frozen layers as one batch, and each layer adds the product of each
run's adapter to its own rows. That is compared with a step of each run by itself, with the fast layer and with PEFT's.
Steps of optimizers are left out: they are the same.
"""

import gc
from collections.abc import Callable
from typing import Any

import arms
import torch
from measures import in_turns, over, timed
from parts import result
from torch import Tensor, nn
from torch.nn import functional

import rankwise as rw
from rankwise.nets.lora_linear import set_fast

RANK = 8
RUNS, TOKENS = (2, 4, 8), (32, 128, 512, 2048)
MOST = 8192
"""Tokens of all runs in a step."""


class Product(torch.autograd.Function):
    """y = W x + b + s B A x for several runs: x (runs, tokens, in), A (runs, r, in), B (runs, out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        u = x @ A.mT
        ctx.save_for_backward(x, u, W, A, B)
        ctx.s = s
        return functional.linear(x, W, b).baddbmm_(u, B.mT, alpha=s)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, W, A, B = ctx.saved_tensors
        v = (g @ B).mul_(ctx.s)
        return (g @ W).baddbmm_(v, A), None, None, v.mT @ x, (g.mT @ u).mul_(ctx.s), None


class Adapted(nn.Module):
    """A frozen linear layer with an adapter for each run."""

    def __init__(self, base: Any, A: list[Tensor], B: list[Tensor], s: float) -> None:
        super().__init__()
        self.base, self.s = base, s
        self.A, self.B = (nn.Parameter(torch.stack([each.detach() for each in factors])) for factors in (A, B))

    def forward(self, x: Tensor) -> Tensor:
        W, b = self.base.weight, self.base.bias
        rows = x.reshape(len(self.A), -1, x.shape[-1]).to(W.dtype)
        y = Product.apply(rows, W, b, self.A.to(W.dtype), self.B.to(W.dtype), self.s)
        return y.view(*x.shape[:-1], -1)


class Heads(nn.Module):
    """A head for each run."""

    def __init__(self, heads: list[Any]) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.stack([head.weight.detach() for head in heads]))
        self.b = None if heads[0].bias is None else nn.Parameter(torch.stack([head.bias.detach() for head in heads]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(self.W), -1, x.shape[-1]) @ self.W.mT
        y = y if self.b is None else y + self.b[:, None]
        return y.view(*x.shape[:-1], -1)


def joined(config: Any, alone: list[arms.Arm]) -> tuple[Any, list[tuple[nn.Parameter, list[nn.Parameter]]]]:
    """One model with the adapters and heads of several, and each of its parameters with those that it joins."""
    model = arms.base(config).requires_grad_(False)
    pairs: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
    for sites in zip(*(rw.sites(arm.model) for arm in alone), strict=True):
        layer = Adapted(
            model.get_submodule(sites[0].name), [s.A for s in sites], [s.B for s in sites], sites[0].scaling
        )
        model.set_submodule(sites[0].name, layer)
        pairs += [(layer.A, [site.A for site in sites]), (layer.B, [site.B for site in sites])]
    [name] = arms.head(config)
    own = [arm.model.get_submodule(f"base_model.model.{name}").modules_to_save["default"] for arm in alone]
    heads = Heads(own)
    model.set_submodule(name, heads)
    pairs.append((heads.W, [head.weight for head in own]))
    return model, pairs


def together(tokens: int, rounds: int, shape: str) -> dict[str, Any]:
    """A row for each number of runs and of tokens of each run, up to four times `tokens`."""
    config, rows, rounds = arms.SHAPES[shape], [], max(3, rounds // 4)
    for count in RUNS:
        alone = [arms.ours(config, RANK, "lora") for _ in range(count)]
        for arm in alone:
            for site in rw.sites(arm.model):
                nn.init.normal_(site.A, std=0.02)
                nn.init.normal_(site.B, std=0.02)
        model, pairs = joined(config, alone)
        for each in TOKENS:
            if each <= 4 * tokens and count * each <= MOST:
                rows.append({"runs": count, "tokens": each, **compared(model, pairs, alone, each, rounds)})
        del alone, model, pairs
        gc.collect()
    return result(rows, rounds=rounds)


def compared(model: Any, pairs: Any, alone: list[arms.Arm], tokens: int, rounds: int) -> dict[str, Any]:
    batches = [arms.rows(tokens) for _ in alone]
    batch = {key: torch.cat([each[key] for each in batches]) for key in batches[0]}

    def clear() -> None:
        for each in (model, *(arm.model for arm in alone)):
            each.zero_grad()

    def one() -> None:
        with arms.computing():
            loss = model(**batch).loss * len(alone)
        loss.backward()

    def each_by_itself() -> None:
        for arm, own in zip(alone, batches, strict=True):
            arm.passes(own)

    def run(passes: Callable[[], None], fast: bool) -> Callable[[], float]:
        def once() -> float:
            for arm in alone:
                set_fast(arm.model, fast)
            seconds = timed(passes)
            clear()
            return seconds

        return once

    for arm in alone:
        set_fast(arm.model)
    one()
    each_by_itself()
    off = max(float((a.grad - torch.stack([p.grad for p in b])).norm() / a.grad.norm()) for a, b in pairs)
    clear()
    runs = {"together": run(one, True), "fast": run(each_by_itself, True), "peft": run(each_by_itself, False)}
    seconds = in_turns(runs, rounds)
    ratios = {f"over {name}": over(seconds["together"], seconds[name]) for name in ("fast", "peft")}
    return {**ratios, "gradients differ by": off}
