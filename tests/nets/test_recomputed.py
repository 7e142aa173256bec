"""Pointwise results are computed again in the backward pass: gradients are the same to the bit, with less kept."""

import copy
import functools
import gc
import inspect
import pickle
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import models
import rankwise as rw
import runs
from asserts import refused
from methods import attached, every_own_method, every_shape, one_shape
from rankwise import tasks
from rankwise.nets import recomputed
from rankwise.nets.lora_linear import set_fast
from rankwise.nets.recomputed import Recomputing, put_on, take_off
from rankwise.train.arguments import Loading
from rankwise.train.memory_need import Alive
from rankwise.train.model import build


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors count too."""
    monkeypatch.setattr(recomputed, "SMALL", 0)


def step(model: nn.Module, call: Callable[[Any], Tensor]) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients, and the bytes that are kept between the forward and the backward pass."""
    model.zero_grad()
    torch.manual_seed(0)
    with Alive(model) as alive:
        loss = call(model)
        gc.collect()
        kept = alive.now
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().clone(), **grads}, kept


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in other if not torch.equal(one[name], other[name])]


def agrees(model: nn.Module, call: Callable[[Any], Tensor]) -> float:
    """Assert that gradients are the same to the bit with recomputation; returns the share of memory that is kept."""
    plain, kept = step(model, call)
    put_on(model)
    lean, kept_lean = step(model, call)
    take_off(model)
    assert_same(lean, plain)
    return kept_lean / kept


def loss_of(**inputs: Any) -> Callable[[Any], Tensor]:
    return lambda model: model(**inputs).loss


@one_shape
@every_own_method
def test_gradients_of_every_method_are_the_same_with_less_kept(name: str, shape: str) -> None:
    model = attached(name, shape).train()
    call = loss_of(**models.batch())
    most = 1.0 if name == "head" else 0.95
    assert agrees(model, call) <= most and agrees(model, torch.autocast("cpu", torch.bfloat16)(call)) <= most
    if set_fast(model):
        assert agrees(model, call) <= most and agrees(model, torch.autocast("cpu", torch.bfloat16)(call)) <= most


AUTOS = {
    AutoModelForSequenceClassification: models.CLASSIFIERS,
    AutoModelForCausalLM: models.WRITERS,
    AutoModelForSeq2SeqLM: models.TRANSLATORS,
}


@pytest.mark.large
@pytest.mark.parametrize("auto", AUTOS, ids=lambda auto: auto.__name__)
def test_gradients_of_every_family_are_the_same(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "permutation", np.arange)  # BigBird draws what a token attends to
    monkeypatch.setattr(np.random, "randint", lambda low, high=None, size=None: np.zeros(size or (), dtype=int))
    ids = torch.arange(2, 26).reshape(2, 12)
    ids[:, -1] = 2  # the end of a row for BART's classifier
    labels = torch.tensor([0, 1]) if auto is AutoModelForSequenceClassification else ids
    more = {"decoder_start_token_id": 0} if auto is AutoModelForSeq2SeqLM else {}
    shares = {}
    for kind, model in models.every_model(auto, AUTOS[auto], pad_token_id=0, **more):
        for name, p in model.named_parameters():
            p.requires_grad_("bias" not in name)
        try:
            step(model.train(), loss_of(input_ids=ids, labels=labels))
        except Exception:  # it needs more than tokens
            continue
        shares[kind] = agrees(model, loss_of(input_ids=ids, labels=labels))
    assert len(shares) > 15 and all(share <= 1.0 for share in shares.values()), shares
    assert statistics.median(shares.values()) < 0.8


GOALS = {"bert": (1.22, 1.02), "llama": (1.05, 1.02), "gpt2": (1.05, 1.02)}
"""Of what the frozen model keeps: LoRA, LoRA-FA."""


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", GOALS)
def test_an_adapter_keeps_hardly_more_than_the_frozen_model(kind: str, fast: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 64}
    options: dict[str, dict[str, Any]] = {
        "bert": {**sizes, "intermediate_size": 1536, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
        "llama": {**sizes, "intermediate_size": 1024, "use_cache": False},
        "gpt2": {"n_embd": 384, "n_layer": 2, "n_head": 6, "vocab_size": 64, "use_cache": False},
    }
    config = transformers.AutoConfig.for_model(kind, **options[kind], pad_token_id=0)
    ids = torch.randint(1, 64, (4, 32))
    for method, goal in zip((rw.LoRA(rank=8), rw.LoRAFA(rank=8)), GOALS[kind], strict=True):
        model: Any = method.attach(AutoModelForSequenceClassification.from_config(config)).train()
        model.enable_input_require_grads()
        call = loss_of(input_ids=ids, labels=torch.zeros(4, dtype=torch.long))
        with model.disable_adapter():
            least = step(model, call)[1]
        set_fast(model, fast)
        plain, much = step(model, call)
        put_on(model)
        lean, kept = step(model, call)
        assert_same(lean, plain)
        assert kept <= goal * least and kept <= much


def bare(body: Callable[..., Tensor], features: int = 64) -> Any:
    """A model that computes the mean of `body` of its layer's output and its inputs."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.second = (
                nn.Linear(features, features), nn.LayerNorm(features), nn.Linear(features, features)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.second(body(self, self.first(x))).square().mean()

    return Bare()


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gelu": lambda model, h: functional.gelu(h),
    "silu": lambda model, h: functional.silu(h),
    "relu": lambda model, h: functional.relu(h),
    "tanh": lambda model, h: torch.tanh(h),
    "norm": lambda model, h: model.norm(h),
    "rms": lambda model, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * model.norm.weight,
    "swiglu": lambda model, h: functional.silu(h) * model.first(h),
    "residual": lambda model, h: h + model.first(h),
    "dropout": lambda model, h: functional.dropout(h, 0.3),
    "native dropout": lambda model, h: torch.native_dropout(h, 0.3, True)[0],
    "bf16 and back": lambda model, h: h.bfloat16().float(),
    "double": lambda model, h: torch.sigmoid(h.double()).float(),
    "transposed": lambda model, h: functional.gelu(h.t()).contiguous().t() * 2,
    "parts": lambda model, h: torch.cat([functional.gelu(part) for part in h.chunk(4, -1)], -1),
    "half": lambda model, h: functional.gelu(h)[..., ::2].repeat(1, 2),
    "view": lambda model, h: functional.gelu(h).view(-1, 4, 16).transpose(0, 1).reshape(-1, 64),
    "in place": lambda model, h: functional.gelu(h).mul_(0.5),
    "in place later": lambda model, h: functional.relu_(model.second(functional.gelu(h)).add_(h)),
    "data in place": lambda model, h: _halved(functional.gelu(h)),
    "matrix": lambda model, h: functional.gelu(h) @ model.first.weight,
    "masked": lambda model, h: functional.gelu(h).masked_fill(h > 1, 0.0),
    "detached": lambda model, h: h * functional.gelu(h).detach(),
    "inside": lambda model, h: Squared.apply(functional.gelu(h)),
    "vmap": lambda model, h: torch.vmap(lambda row: functional.gelu(row) * row)(h),
    "complex": lambda model, h: torch.view_as_complex(functional.gelu(h).view(-1, 32, 2)).conj().abs().repeat(1, 2),
    "again": lambda model, h: checkpoint(lambda h: functional.gelu(model.norm(h)), h, use_reentrant=False),
    "again, reentrant": lambda model, h: checkpoint(lambda h: functional.gelu(model.norm(h)), h, use_reentrant=True),
}


def _halved(tensor: Tensor) -> Tensor:
    tensor.data.mul_(0.5)  # no new version
    return tensor


class Squared(torch.autograd.Function):
    """Saves what it computes by itself, and its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, twice := x * 2)
        return x * twice

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, twice = ctx.saved_tensors
        return grad * (twice + 2 * x)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_any_operations_after_one_another_give_the_same(names: list[str], autocast: bool, trained: bool) -> None:
    model = bare(lambda model, h: functools.reduce(lambda h, name: STEPS[name](model, h).to(h.dtype), names, h))
    model.first.requires_grad_(trained)

    def call(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(X.clone().requires_grad_())

    assert agrees(model, call) <= 1.0


def test_what_is_saved_by_its_own_operation_is_computed_again() -> None:
    """Only h is kept: exp, tanh and sigmoid save what they return."""
    model = bare(lambda model, h: torch.exp(torch.tanh(torch.sigmoid(functional.gelu(h)))))
    assert agrees(model, lambda model: model(X.clone())) < 0.7  # x, h and what is squared, of six


def test_gradients_are_the_same_whatever_is_done_with_the_graph() -> None:
    """Two losses at once, two backward passes through one graph, some gradients only, second derivatives."""

    def found(model: Any) -> list[Tensor]:
        torch.manual_seed(0)
        losses = [model(X), model(2 * X)]
        params = [*model.parameters()]
        grads = [torch.autograd.grad(sum(losses), params, retain_graph=True) for _ in range(2)]
        grads += [torch.autograd.grad(loss, params[-2:], retain_graph=True) for loss in losses]
        grads += [torch.autograd.grad(losses[1], params)]
        first = torch.autograd.grad(losses[0], params, create_graph=True)
        grads += [torch.autograd.grad(sum(each.square().sum() for each in first), params)]
        return [each for some in grads for each in some]

    names = ("norm", "gelu", "dropout", "residual", "swiglu", "rms")
    model = bare(lambda model, h: functools.reduce(lambda h, name: STEPS[name](model, h), names, h))
    plain = found(model)
    put_on(model)
    assert all(torch.equal(one, other) for one, other in zip(found(model), plain, strict=True))


def test_an_input_that_is_changed_in_place_afterwards_is_an_error_as_in_torch() -> None:
    inputs: list[Tensor] = []

    def body(model: Any, h: Tensor) -> Tensor:
        inputs.append(h)
        return functional.gelu(h)

    model = bare(body)
    put_on(model)
    for changed in ("the input", "a parameter"):
        loss = model(X)
        with torch.no_grad():
            (inputs[-1] if changed == "the input" else model.second.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_computed_tensor_that_a_backward_pass_changes_is_an_error_for_the_next() -> None:
    """It may be handed out twice, as the tensor that was saved would be."""

    class Rude(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            x.add_(1)
            return grad

    model = bare(lambda model, h: Squared.apply(g := functional.gelu(h)) + Rude.apply(g))  # runs first
    put_on(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(X).backward()


class Behind(torch.autograd.Function):
    """Changes its argument in place as a kernel does that torch knows nothing of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.detach().numpy()[...] *= 2
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_kernel_that_changes_a_tensor_behind_torchs_back_is_noticed() -> None:
    model = bare(lambda model, h: Behind.apply(functional.gelu(h)))
    put_on(model)
    assert refused(lambda: model(X)) == recomputed.CHANGED
    assert refused(lambda: model(X[:1])) == recomputed.CHANGED  # with few rows, which would not be worth it
    model = bare(lambda model, h: Behind.apply(model.first(h)) + functional.gelu(h) * torch.nan)  # not one of a recipe
    put_on(model)
    model(X).backward()


def test_nothing_stays_after_a_step_or_when_the_graph_is_dropped() -> None:
    """Not even until the garbage collector comes."""
    names = ("norm", "gelu", "dropout", "swiglu", "rms", "tanh", "native dropout")
    model = bare(lambda model, h: functools.reduce(lambda h, name: STEPS[name](model, h), names, h))
    put_on(model)
    model(X).backward()
    gc.collect()
    gc.disable()
    try:
        with Alive(model) as alive:
            for how in range(6):
                before = alive.now
                loss = model(X.clone())
                assert alive.now > before
                if how % 2:
                    loss.backward()
                if how % 3 == 0:
                    torch.autograd.grad(model(X.clone()), [model.second.weight])
                del loss
                model.zero_grad()
                assert alive.now == before
    finally:
        gc.enable()
    made = [each for each in gc.get_objects() if isinstance(each, (recomputed.Recipe, recomputed.Kept))]
    assert not made


def test_long_chains_of_small_operations_are_cut() -> None:
    def body(model: Any, h: Tensor) -> Tensor:
        for _ in range(500):
            h = torch.sin(h) * h
        return h

    model = bare(body)
    put_on(model)
    longest = 0
    value = recomputed.Recipe.value

    def counted(recipe: recomputed.Recipe, *args: Any) -> Tensor:
        nonlocal longest
        longest = max(longest, recipe.steps)
        return value(recipe, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputed.Recipe, "value", counted)
        model(X).backward()
    assert recomputed.LONGEST // 2 < longest <= recomputed.LONGEST
    take_off(model)
    assert agrees(model, lambda model: model(X)) < 0.5


@pytest.mark.parametrize("reentrant", [False, True])
@every_shape
def test_with_gradient_checkpointing_gradients_are_the_same(shape: str, reentrant: bool) -> None:
    model = attached("lora", shape).train()
    if shape != "t5" or not reentrant:
        models.recompute(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert agrees(model, loss_of(**models.batch())) <= 1.0


def test_hooks_that_others_put_around_the_model_are_theirs() -> None:
    model = bare(STEPS["gelu"])
    put_on(model)
    expected = step(model, lambda model: model(X))[0]
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: packed.append(each) or each, lambda each: each):
        assert_same(step(model, lambda model: model(X))[0], expected)
    assert packed
    x = X.clone().requires_grad_()
    around = lambda model: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    assert_same(step(model, around)[0], expected)
    with Alive(model) as alive:
        loss = around(model)
        assert alive.now == loss.untyped_storage().nbytes()


def test_a_tensor_of_inference_mode_is_taken_as_ever() -> None:
    with torch.inference_mode():
        shift = torch.ones(64)
    assert agrees(bare(lambda model, h: functional.gelu(h) + shift), lambda model: model(X)) <= 1.0


def test_tensors_without_numbers_are_computed_again() -> None:
    model = bare(STEPS["norm"]).to("meta")
    put_on(model)
    model(X.to("meta")).backward()
    assert model.first.weight.grad.shape == (64, 64)


def test_a_tensor_of_no_rows_is_computed_again() -> None:
    agrees(bare(lambda model, h: h + model.second(h[:0].bfloat16().float()).sum()), lambda model: model(X))


def test_weights_that_are_freed_between_the_passes_are_refused(tmp_path: Path) -> None:
    """By FSDP after each of its parts: what the next one keeps would be computed from them."""
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), nn.Linear(64, 64))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for part in (model[0], model):
            fully_shard(part, mesh=mesh)
        model(X).sum().backward()
        put_on(model)
        assert refused(lambda: model(X).sum().backward()) == recomputed.FREED
    finally:
        dist.destroy_process_group()


def test_a_pickled_model_is_lean_again() -> None:
    model: Any = attached("lora", "bert")
    put_on(model)
    other = pickle.loads(pickle.dumps(model)).get_base_model()
    assert isinstance(other.forward, Recomputing) and other.forward.own.__self__ is other


def test_without_gradients_compiled_or_transformed_the_model_computes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bare(STEPS["norm"])
    put_on(model)
    loss = model(X)
    loss.backward()
    grad = model.first.weight.grad.clone()
    monkeypatch.setattr(recomputed.Recording, "__init__", None)
    with torch.no_grad():
        assert torch.equal(model(X), loss)
    with torch.inference_mode():
        assert torch.equal(model(X), loss)
    params = dict(model.named_parameters())
    found = torch.func.grad(lambda params: torch.func.functional_call(model, params, (X,)))(params)
    assert torch.allclose(found["first.weight"], grad, atol=1e-7)
    model.zero_grad()
    torch.compile(model, backend="eager")(X).backward()
    assert torch.allclose(model.first.weight.grad, grad, atol=1e-7)
    torch._dynamo.reset()


def test_an_error_in_the_forward_pass_leaves_no_hooks() -> None:
    def body(model: Any, h: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = bare(body)
    put_on(model)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert _get_current_dispatch_mode() is None


def test_a_model_is_taken_back_and_a_copy_is_a_model_of_its_own() -> None:
    model: Any = attached("lora", "bert")
    base = model.get_base_model()
    own = inspect.signature(base.forward)
    put_on(model)
    put_on(model)
    assert isinstance(base.forward, Recomputing) and not isinstance(base.forward.own, Recomputing)
    assert inspect.signature(base.forward) == own
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    expected = models.logits(model)
    assert not models.logits(other).any() and torch.equal(models.logits(model), expected)
    assert other(**models.batch()).loss.item() == pytest.approx(np.log(models.LABELS))
    take_off(model)
    assert "forward" not in vars(base) and isinstance(other.get_base_model().forward, Recomputing)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_gradients_on_a_quantised_base_are_the_same(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, task = runs.bert(tmp_path / "bert", dropout=0.0), tasks.build("stdlib-kind")
    model, _, head = build(base, task, 16, loading=Loading(quantise=kind))
    model = models.stirred(rw.LoRA(rank=2).attach(model, head)).train()
    ids = torch.randint(5, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    assert agrees(model, loss_of(input_ids=ids, labels=torch.tensor([0, 1, 0, 1]))) < 1.0
