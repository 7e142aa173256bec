"""The fast layer computes what PEFT's does, forward and backward, and leaves all that it does not cover to PEFT."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers.pytorch_utils import Conv1D

import models
import rankwise as rw
from methods import METHODS, attached, by_turns, method
from rankwise.errors import InputError
from rankwise.nets.lora_linear import KINDS, FastLinear, LoraLinearFunction, set_fast
from rankwise.ranks import sites
from rankwise.ranks.scales import Gates, Omega


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, kind: str = "linear") -> None:
        super().__init__()
        self.linear = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.linear(x, **more)


def one(inputs: int = 6, outputs: int = 5, rank: int = 2, base: nn.Module | None = None, **config: Any) -> Any:
    """One layer with an adapter whose B is not 0."""
    torch.manual_seed(0)
    config = {"lora_alpha": 3, "target_modules": ["linear"], **config}
    model = get_peft_model(base or One(inputs, outputs), LoraConfig(r=rank, **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model.train()


def layer_of(model: Any) -> Any:
    return model.base_model.model.linear


def is_fast(y: Tensor) -> bool:
    """Whether the fast function has taken part in computing y."""
    nodes = [y.grad_fn]
    for node in nodes:
        nodes += [after for after, _ in node.next_functions] if node is not None else []
    return any(LoraLinearFunction.__name__ in node.name() for node in nodes if node is not None)


def results(model: Any, x: Tensor, seed: int = 0, positive: bool = False, **more: Any) -> dict[str, Tensor]:
    """What the model gives, and its gradients, those of x too."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x, **more)
    model.zero_grad()
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * (g.abs() if positive else g)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y, "x": x.grad, **{name: grad.clone() for name, grad in grads.items()}, "draw": torch.rand(1)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got, expected = ours[name].detach(), expected.detach()
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if got.numel():
            size = max(float(expected.abs().max()), 1.0)
            assert float((got.double() - expected.double()).abs().max()) <= tolerance * size, name


def terms(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The sums of the absolute values of all terms that the results are sums of, to which rounding is in proportion."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    layer_of(model).scaling["default"] /= (1 - getattr(layer_of(model).lora_dropout["default"], "p", 0.0)) ** 2
    return {name: value.detach() for name, value in results(model, x.double().abs(), positive=True).items()}


def agrees(model: Any, x: Tensor, tolerance: float = 1e-5, expect_fast: bool = True, **more: Any) -> None:
    """Assert that the model gives the same with the fast layer as by PEFT, and whether the function was used."""
    theirs = results(model, x, **more)
    rw.fast(model)
    ours = results(model, x, **more)
    assert is_fast(ours["y"]) is expect_fast
    rw.fast(model, on=False)
    assert not is_fast(theirs["y"]) and not is_fast(model(x, **more))
    assert_same(ours, theirs, 0.0 if not expect_fast else tolerance)


def scale(model: Any, kind: str) -> None:
    if kind == "omega":
        Omega.put_on(model)
        with torch.no_grad():
            for site in sites(model):
                site.scale.parameter.fill_(0.7)
    elif kind == "gates":
        Gates.put_on(model, lambda rank: torch.linspace(0, 1, rank))


sizes = st.integers(1, 9)


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 7), max_size=3),
    *(sizes, sizes, sizes),
    st.sampled_from(["linear", "no bias", "conv1d"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from(["", "omega", "gates"]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from(["both", "A", "B", "bias"]),
)
def test_the_fast_layer_is_pefts(
    rows: list[int],
    inputs: int,
    outputs: int,
    rank: int,
    kind: str,
    dtype: torch.dtype,
    own: bool,
    scaled: str,
    dropout: float,
    trains: str,
) -> None:
    """`own`: whether A and B have the dtype of the base, not at least fp32 as PEFT casts them."""
    base = One(inputs, outputs, bias=kind != "no bias", kind=kind).to(dtype)
    model = one(rank=rank, base=base, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d")
    for module in (*layer_of(model).lora_A.values(), *layer_of(model).lora_B.values()) if own else ():
        module.to(dtype)
    if not own and dtype != torch.float64:
        assert layer_of(model).lora_B["default"].weight.dtype == torch.float32
    scale(model, scaled)
    (site,) = sites(model)
    site.A.requires_grad_(trains != "B")
    site.B.requires_grad_(trains != "A")
    if trains == "bias" and kind != "no bias":
        layer_of(model).base_layer.bias.requires_grad_()
    x = torch.randn(*rows, inputs, dtype=dtype)
    theirs, most = results(model, x), terms(model, x)
    rw.fast(model)
    ours = results(model, x)
    assert is_fast(ours["y"]) and not is_fast(theirs["y"])
    assert ours.keys() == theirs.keys() == most.keys()
    assert torch.equal(ours.pop("draw"), theirs["draw"])  # as many random numbers were drawn
    for name, got in ours.items():
        assert got.dtype == theirs[name].dtype and got.shape == theirs[name].shape
        apart = (got.detach().double() - theirs[name].detach().double()).abs()
        assert (apart <= 16 * torch.finfo(dtype).eps * most[name] + 1e-6 * (dtype == torch.float16)).all(), name


@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("scaled", ["", "omega", "gates"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_finite_differences(tokens: int, kind: str, scaled: str, dropout: float) -> None:
    model = one(base=One(3, 2, kind=kind).double(), lora_dropout=dropout, fan_in_fan_out=kind == "conv1d")
    scale(model, scaled)
    model.double()
    rw.fast(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (3 if scaled else 2)

    def output(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return model(x)

    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    assert is_fast(output(x))
    assert torch.autograd.gradcheck(output, (x, *trained), fast_mode=tokens > 3)


def test_half_precision_loses_no_small_change_of_a_large_weight() -> None:
    """256 + 0.5 is 256 in bf16, so that W + s B A must not be formed there, however many the tokens."""
    model = one(2, 1, rank=1, lora_alpha=1).to(torch.bfloat16)
    layer, values = layer_of(model), {"weight": 256.0, "bias": 0.0}
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer.base_layer, name).fill_(value)
        layer.lora_A["default"].weight.copy_(torch.tensor([[0.5, 0.0]]))
        layer.lora_B["default"].weight.fill_(1)
    rw.fast(model)
    y = model(torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16).expand(400, 2))
    assert is_fast(y) and (y == 0.5).all()


@by_turns("name", METHODS)
def test_every_method_trains_as_with_pefts_layers(name: str, shape: str) -> None:
    losses, states = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = attached(name, shape).double()
        touched = set_fast(model, on)
        optimizer = rw.SimplexAdam(method(name), model, lr=1e-2)
        losses.append(models.train(model, optimizer, 6))
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=key)
    adapted = [module for module in model.modules() if isinstance(module, tuple(KINDS))]
    assert len(touched) == len(adapted) and all(type(module) in KINDS.values() for module in adapted)


@pytest.mark.large
@pytest.mark.parametrize("kinds", [models.CLASSIFIERS, models.WRITERS], ids=["classifiers", "writers"])
def test_models_of_every_family_compute_the_same(kinds: dict[str, Any]) -> None:
    auto = (
        transformers.AutoModelForCausalLM
        if kinds is models.WRITERS
        else transformers.AutoModelForSequenceClassification
    )
    seen, covered = 0, 0
    more = {} if kinds is models.WRITERS else {"num_labels": 3}
    for kind, base in models.every_model(auto, kinds, pad_token_id=0, **more):
        ids = {"input_ids": torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(0))}
        try:
            assert base.double()(**ids).logits.isfinite().all()
            model = rw.LoRA(rank=2).attach(base, head=[]).eval()
        except Exception:  # takes other inputs, is too large for its weights, or has no linear layers
            continue
        models.stirred(model)
        gradients, outputs = [], []
        for on in (False, True):
            touched = set_fast(model, on)
            outputs.append(model(**ids).logits)
            model.zero_grad()
            outputs[-1].sum().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9, msg=kind)
        assert gradients[0].keys() == gradients[1].keys(), kind
        for name, grad in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], grad, rtol=1e-7, atol=1e-7, msg=f"{kind} {name}")
        seen, covered = seen + 1, covered + bool(touched)
    assert seen > 20 and covered == seen


def two_at_once(model: Any, **config: Any) -> None:
    model.add_adapter("other", LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False, **config))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.4, 0.0), (0.4, 0.3)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("tokens", [4, 400])
def test_several_adapters_are_added_one_after_another(tokens: int, kind: str, dropouts: tuple[float, float]) -> None:
    base = One(6, 5, bias=kind != "no bias", kind=kind)
    model = one(base=base, lora_dropout=dropouts[0], fan_in_fan_out=kind == "conv1d").double()
    two_at_once(model, lora_dropout=dropouts[1], fan_in_fan_out=kind == "conv1d")
    model.double()
    agrees(model, torch.randn(tokens, 6).double(), 1e-12)


def test_several_adapters_more_precise_than_their_base_are_added_by_peft() -> None:
    """PEFT rounds to the base's dtype once, after the last."""
    model = one(base=One(6, 5).to(torch.bfloat16))
    two_at_once(model)
    agrees(model, torch.randn(4, 6).to(torch.bfloat16), expect_fast=False)
    with torch.autocast("cpu", torch.bfloat16):
        agrees(model, torch.randn(4, 6), 3e-2)


@given(
    *(st.integers(0, 40), sizes, sizes, sizes),
    st.sampled_from(["linear", "conv1d"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 0.4]),
)
def test_the_layer_of_adalora_is_pefts(
    tokens: int, inputs: int, outputs: int, rank: int, kind: str, dtype: torch.dtype, dropout: float
) -> None:
    torch.manual_seed(0)
    base = One(inputs, outputs, kind=kind).to(dtype)
    config = peft.AdaLoraConfig(
        **{"init_r": rank, "lora_dropout": dropout, "target_modules": ["linear"], "total_step": 9},
        fan_in_fan_out=kind == "conv1d",
    )
    model: Any = get_peft_model(base, config).train()
    with torch.no_grad():
        for p in (layer := layer_of(model)).parameters():
            p.normal_() if p.requires_grad else None
        layer.lora_E["default"][0] = 0
    x = torch.randn(tokens, inputs, dtype=dtype)
    theirs = results(model, x)
    assert rw.fast(model)
    ours = results(model, x)
    assert is_fast(ours["y"]) and not is_fast(theirs["y"])
    assert torch.equal(ours.pop("draw"), theirs.pop("draw"))
    for name, got in ours.items():
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        size = max(1.0, float(theirs[name].detach().abs().max())) if got.numel() else 1.0
        torch.testing.assert_close(got, theirs[name], rtol=0, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", [torch.float64, torch.bfloat16])
def test_parts_of_a_fused_projection_are_fast(dropout: float, weights: torch.dtype) -> None:
    base = models.model("gpt2").to(weights)
    method = rw.LoRA(rank=2, dropout=dropout, targets=["c_attn.q", "c_attn.v"])
    model: Any = method.attach(base, head=[])
    models.stirred(model)
    model.train()
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    outputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, y: outputs.append(y) and None)
    gradients = []
    for on in (False, True):
        outputs.clear()
        rw.fast(model, on)
        torch.manual_seed(0)
        logits = model(**models.batch()).logits
        assert outputs and all(is_fast(y) is on for y in outputs)
        model.zero_grad()
        logits.double().pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * len(layers)
    for name, grad in gradients[0].items():
        tolerance = 1e-10 if weights == torch.float64 else 0.1
        size = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(gradients[1][name], grad, rtol=0, atol=tolerance * size, msg=name)


# What PEFT's layers can do besides: computed by PEFT, or changed between two calls of a fast layer.


def test_a_layer_is_taken_off_and_left_as_it_was() -> None:
    model = one()
    before = vars(layer_of(model)).keys()
    assert rw.fast(model) == ["base_model.model.linear"] == rw.fast(model)
    assert type(layer_of(model)) is FastLinear and repr(layer_of(model)).startswith("lora.Linear(")
    assert rw.fast(model, on=False) == ["base_model.model.linear"] and rw.fast(model.base_model.model.linear, on=False)
    assert type(layer_of(model)) is LoraLinear and vars(layer_of(model)).keys() == before


def test_a_model_without_such_layers_is_refused_in_a_line() -> None:
    for model in (One(2, 3), get_peft_model(models.model(), LoraConfig(r=2, target_modules=["word_embeddings"]))):
        with pytest.raises(InputError, match=r"^\w+ has no LoRA on linear layers .*: call fast once it is attached$"):
            rw.fast(model)
        assert rw.fast(model, on=False) == []


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def hooked(part: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda model: part(layer_of(model)).register_forward_hook(lambda module, args, y: 2 * y) and None


def own_forward(model: Any) -> None:
    base = layer_of(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) + 1


def trained_base(model: Any) -> None:
    layer_of(model).base_layer.weight.requires_grad_()


def tensor_scaling(model: Any) -> None:
    layer_of(model).scaling["default"] = torch.tensor(1.5)


@pytest.mark.parametrize(
    "change",
    [
        *(disabled, own_forward, trained_base, tensor_scaling),
        lambda model: model.merge_adapter(),
        hooked(lambda layer: layer.base_layer),
        hooked(lambda layer: layer.lora_A["default"]),
        hooked(lambda layer: layer.lora_B["default"]),
        hooked(lambda layer: layer.lora_dropout["default"]),
    ],
)
def test_what_is_not_covered_is_computed_by_peft_bit_for_bit(change: Callable[[Any], Any]) -> None:
    model = one()
    change(model)
    agrees(model, torch.randn(4, 6), expect_fast=False)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}, {"velora_config": peft.VeloraConfig()}])
def test_variants_are_computed_by_peft_bit_for_bit(config: dict[str, Any]) -> None:
    agrees(one(**config), torch.randn(4, 6), expect_fast=False)


@pytest.mark.parametrize(
    "config", [{"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_dropout": 0.1}]
)
def test_options_of_plain_lora_are_covered(config: dict[str, Any]) -> None:
    model = one(**config)
    agrees(model, torch.randn(4, 6))
    if "bias" in config:
        assert "base_model.model.linear.base_layer.bias" in results(model, torch.randn(4, 6))


def test_tensors_without_numbers_are_computed() -> None:
    for device in ("meta", "cpu"):
        model = one().to(device)
        rw.fast(model)
        model(torch.randn(4, 6, device=device)).sum().backward()
        assert layer_of(model).lora_B["default"].weight.grad.shape == (5, 2)


def test_an_evaluation_without_gradients_is_computed_by_peft_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = one(384, 384, rank=8).eval()
    x = torch.randn(64, 384)
    theirs = model(x).detach()
    rw.fast(model)
    assert is_fast(y := model(x)) and not torch.equal(y, theirs)
    with torch.no_grad():
        assert torch.equal(model(x), theirs)


def test_mixed_batches_are_computed_by_peft() -> None:
    model = one()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False))
    model.eval()
    x, names = torch.randn(3, 6), ["default", "other", "__base__"]
    theirs = model(x, adapter_names=names)
    rw.fast(model)
    assert torch.equal(model(x, adapter_names=names), theirs)


def test_pefts_own_calls_change_a_fast_model_as_they_change_theirs(tmp_path: Path) -> None:
    fast_model, slow_model = one(), one()
    rw.fast(fast_model)
    x = torch.randn(4, 6)

    def compare(fast: bool = True) -> None:
        ours, theirs = results(fast_model, x), results(slow_model, x)
        assert is_fast(ours["y"]) is fast
        assert_same(ours, theirs, 1e-5)

    compare()
    torch.manual_seed(1)
    other = one(lora_alpha=1)
    other.save_pretrained(tmp_path / "other")
    for model in (fast_model, slow_model):
        model.load_adapter(tmp_path / "other", "other", is_trainable=True)
        model.set_adapter("other")
    compare()
    for model in (fast_model, slow_model):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "sum", combination_type="cat")
        model.set_adapter("sum", inference_mode=False)
    compare()
    for model in (fast_model, slow_model):
        model.set_adapter("default")
        hotswap_adapter(model, tmp_path / "other", "default")
    compare()
    with rescale_adapter_scale(fast_model, 0.5), rescale_adapter_scale(slow_model, 0.5):
        compare()
    for model in (fast_model, slow_model):
        model.delete_adapter("other")
        model.merge_adapter()
    compare(fast=False)
    for model in (fast_model, slow_model):
        model.unmerge_adapter()
    compare()
    with fast_model.disable_adapter(), slow_model.disable_adapter():
        assert torch.equal(fast_model(x), slow_model(x))
    compare()
    for name, model in (("fast", fast_model), ("slow", slow_model)):
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "slow").rglob("*.*"):
        assert (tmp_path / "fast" / file.relative_to(tmp_path / "slow")).read_bytes() == file.read_bytes()
    assert type(fast_model.merge_and_unload().linear) is nn.Linear


def test_copies_and_pickles_of_a_fast_model_are_fast() -> None:
    model = one()
    rw.fast(model)
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            layer_of(other).base_layer.weight += 1
        y = other(x)
        assert is_fast(y) and not torch.allclose(y, model(x))
        assert is_fast(model(x))


def test_a_changed_rank_and_an_emptied_site_are_seen_at_once() -> None:
    torch.manual_seed(0)
    model = rw.LoRA(rank=4).attach(models.model().double(), head=["classifier"])
    models.stirred(model)
    rw.fast(model)
    names = [site.name for site in sites(model)]
    rw.resize(model, {names[0]: 2, names[1]: 0, names[2]: 6})
    ours = models.logits(model)
    assert not torch.allclose(ours, models.logits(rw.LoRA(rank=4).attach(models.model().double(), head=["classifier"])))
    rw.fast(model, on=False)
    torch.testing.assert_close(ours, models.logits(model), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_are_computed_by_peft_bit_for_bit() -> None:
    model = one().double()
    x, along = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def dual() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, along))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    def of_each_row() -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: model(row).pow(2).sum()))(x)

    ways = (dual, of_each_row)
    theirs = [way() for way in ways]
    rw.fast(model)
    assert all(torch.equal(way(), expected) for way, expected in zip(ways, theirs, strict=True))


def test_a_second_derivative_is_refused_in_a_line() -> None:
    model = one()
    rw.fast(model)
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(InputError, match=r"no second derivatives .*: call fast\(model, on=False\) first$"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_an_input_of_another_width_is_refused_as_by_peft() -> None:
    model = one()
    rw.fast(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 12))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same(reentrant: bool) -> None:
    model = one(lora_dropout=0.3)
    rw.fast(model)
    x = torch.randn(4, 6)
    expected = results(model, x)
    again = results(lambda_model(model, partial(checkpoint.checkpoint, model, use_reentrant=reentrant)), x)
    assert_same(again, expected, 0.0)


@pytest.mark.large
def test_a_compiled_model_computes_the_same() -> None:
    model = one()
    theirs = results(model, x := torch.randn(4, 6))
    rw.fast(model)
    assert_same(results(lambda_model(model, torch.compile(model, backend="aot_eager")), x), theirs, 1e-5)


def lambda_model(model: nn.Module, call: Callable[..., Tensor]) -> Any:
    """`model` with another way to be called."""

    class Called:
        zero_grad, named_parameters = model.zero_grad, model.named_parameters

        def __call__(self, x: Tensor) -> Tensor:
            return call(x)

    return Called()


# What is kept for the backward pass.


@contextmanager
def kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """The bytes that are kept, by storage, other than parameters'."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("tokens", [4, 400])
@pytest.mark.parametrize(
    ("frozen", "dropout", "per_token"),
    [
        ("", 0.0, {4: 4 * (6 + 2), 400: 4 * 6}),  # x and u; x alone
        ("A", 0.0, {4: 4 * 2, 400: 4 * 2}),  # u
        ("B", 0.0, {4: 4 * 6, 400: 4 * 6}),  # x
        ("", 0.5, {4: 4 * (6 + 2) + 6, 400: 4 * (6 + 2) + 6}),  # and a mask of bytes
        ("A", 0.5, {4: 4 * 2 + 6, 400: 4 * 2 + 6}),
    ],
)
def test_no_more_is_kept_than_what_the_gradients_need(
    tokens: int, frozen: str, dropout: float, per_token: dict[int, int]
) -> None:
    model = one(lora_dropout=dropout)
    (site,) = sites(model)
    for name in frozen:
        getattr(site, name).requires_grad_(False)
    rw.fast(model)
    x = torch.randn(tokens, 6, requires_grad=True)
    with kept(model) as sizes:
        y = model(x)
    assert is_fast(y) and sum(sizes.values()) == tokens * per_token[tokens]


# What went wrong in other fused LoRA layers.


def test_dropout_is_undone_where_the_input_is_zero_too() -> None:
    """https://github.com/foundation-model-stack/fms-acceleration/issues/97: no mask, then one by x ≠ 0."""
    model = one(lora_dropout=0.5).double()
    agrees(model, torch.randn(40, 6).double().relu(), 1e-12)


def test_a_graph_can_be_gone_through_twice() -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/pull/3800: the first pass wrote ∂x over the x that it had kept."""
    model = one()
    rw.fast(model)
    for tokens in (4, 400):
        x = torch.randn(tokens, 6, requires_grad=True)
        y, inputs = model(x), (x, *(p for p in model.parameters() if p.requires_grad))
        first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), inputs), first))


class Viewed(torch.autograd.Function):
    """Gives a view, as some fused norms do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 2).view(2, 2, 6)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * g.reshape(4, 6)


@pytest.mark.parametrize("shape", [(2, 2, 6), (4, 6)])
def test_the_output_can_be_changed_in_place_and_the_input_be_a_view(shape: tuple[int, ...]) -> None:
    """https://github.com/NVIDIA-NeMo/Automodel/pull/2584 and https://github.com/unslothai/unsloth/issues/3452."""
    model = one()

    def call(x: Tensor) -> Tensor:
        y = model(Viewed.apply(x).view(shape)).view(4, 5)
        y += 1
        y[0] *= 2
        return y

    x = torch.randn(4, 6)
    theirs = results(lambda_model(model, call), x)
    rw.fast(model)
    assert_same(results(lambda_model(model, call), x), theirs, 1e-5)


def test_selective_checkpointing_may_keep_the_product_that_is_added_to() -> None:
    """https://github.com/NVIDIA-NeMo/Automodel/pull/3274: a kept product was added to in place."""
    model = one(lora_dropout=0.3)
    rw.fast(model)
    x = torch.randn(4, 6)
    expected = results(model, x)
    products = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = partial(checkpoint.create_selective_checkpoint_contexts, products)
    call = partial(checkpoint.checkpoint, model, use_reentrant=False, context_fn=contexts)
    assert_same(results(lambda_model(model, call), x), expected, 0.0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_casts_whatever_comes_in(weights: torch.dtype, inputs: torch.dtype, dropout: float) -> None:
    """https://github.com/unslothai/unsloth/pull/7020: fp32 activations met bf16 weights, since a function of one's own
    does not see autocast."""
    model = one(base=One(6, 5).to(weights), lora_dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16):
        agrees(model, torch.randn(4, 6, dtype=inputs), 3e-2)
        agrees(model, torch.randn(400, 6, dtype=inputs), 1e-1)
        x = torch.randn(4, 6, dtype=inputs, requires_grad=True)
        rw.fast(model)
        y = model(x)
    y.sum().backward()  # outside, as trainers do; above it was inside
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == inputs
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
