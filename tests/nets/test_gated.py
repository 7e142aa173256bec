"""The wrapper of the SoRA report: it is the layer until activated, and what it learnt is in the layer afterwards."""

import copy
import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.errors import InputError
from rankwise.nets import gated as module
from rankwise.nets.gated import Gated

SETTINGS = settings(deadline=None, max_examples=60)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A linear layer or a convolution of any kind, in fp32, and inputs for it."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    bias = draw(st.booleans())
    dims = draw(st.integers(0, 3))
    if dims == 0:
        width = draw(st.integers(1, 6))
        shape = draw(st.sampled_from([(width,), (3, width), (2, 3, width)]))
        return nn.Linear(width, draw(st.integers(1, 6)), bias=bias), torch.randn(shape)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    by_word = draw(st.booleans())
    sizes = st.sampled_from([1, 3] if by_word else [1, 2, 3])  # torch warns of `same` around an even kernel
    kernel = tuple(draw(sizes) for _ in range(dims))
    if by_word:
        ways: dict[str, Any] = {"padding": draw(st.sampled_from(["same", "valid"]))}
    else:
        ways = {
            "padding": tuple(draw(st.integers(0, 2)) for _ in range(dims)),
            "stride": tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        }
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,  # type: ignore[arg-type]
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(dims)),  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        **ways,
    )
    batch = draw(st.sampled_from([(), (2,)]))
    return layer, torch.randn(*batch, layer.in_channels, *[6] * dims)


@st.composite
def ranked(draw: st.DrawFn) -> tuple[nn.Module, Tensor, int]:
    layer, x = draw(layers())
    groups = getattr(layer, "groups", 1)
    return layer, x, groups * draw(st.integers(1, Gated(layer).limit // groups))


def learn(gated: Gated) -> None:
    """Random factors in place of some steps of training."""
    with torch.no_grad():
        for p in (gated.A.weight, gated.B.weight, gated.gates):
            p.normal_()


@given(ranked(), st.sampled_from(["normal", "kaiming"]), st.sampled_from(["ones", "normal"]))
@SETTINGS
def test_activating_changes_no_bit_and_only_the_factors_train(case: Any, init: Any, gates: Any) -> None:
    layer, x, rank = case
    before = layer(x)
    gated = Gated(layer)
    assert torch.equal(gated(x), before) and gated.rank == 0
    gated.activate(rank, init=init, gates=gates)
    assert torch.equal(gated(x), before)
    assert gated.rank == rank
    assert {name for name, p in gated.named_parameters() if p.requires_grad} == {"A.weight", "B.weight", "gates"}
    gated(x).sum().backward()
    assert layer.weight.grad is None
    assert gated.B.weight.grad.abs().sum() > 0  # B = 0, yet it can leave it


@given(ranked())
@SETTINGS
def test_merging_is_exact_and_leaves_the_bare_layer(case: Any) -> None:
    layer, x, rank = case
    layer.weight.requires_grad_(False)
    keys, seen = set(layer.state_dict()), {name: p.requires_grad for name, p in layer.named_parameters()}
    gated = Gated(layer)
    gated.activate(rank, alpha=rank / 2)
    learn(gated)
    active, effective = gated(x), gated.weight.detach().clone()
    bare = gated.deactivate()
    assert bare is layer
    scale = 1 + float(active.detach().abs().max())
    torch.testing.assert_close(layer(x), active, atol=1e-5 * scale, rtol=1e-5)
    assert torch.equal(gated(x), layer(x))
    torch.testing.assert_close(layer.weight.data, effective, atol=1e-5, rtol=1e-5)
    assert (gated.rank, gated.active, gated.A, gated.B, gated.gates) == (0, False, None, None, None)
    assert set(layer.state_dict()) == keys
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == seen
    assert set(gated.state_dict()) == {f"layer.{key}" for key in keys}


@given(ranked())
@SETTINGS
def test_gates_at_zero_are_the_layer(case: Any) -> None:
    layer, x, rank = case
    before, weight = layer(x), layer.weight.detach().clone()
    gated = Gated(layer)
    gated.activate(rank)
    learn(gated)
    gated.prox(float(gated.gates.detach().abs().max()))
    assert gated.rank == 0 and gated.active
    assert torch.equal(gated(x), before)
    assert gated.prune() == 0
    assert torch.equal(gated(x), before)
    gated.deactivate()
    assert torch.equal(layer.weight, weight)


@given(ranked(), st.floats(0, 2))
@SETTINGS
def test_pruning_changes_nothing_but_the_size(case: Any, threshold: float) -> None:
    layer, x, rank = case
    gated = Gated(layer)
    gated.activate(rank)
    learn(gated)
    gated.prox(threshold)
    before, live, scaling = gated(x), gated.rank, float(gated.scaling)
    kept = gated.gates[gated.gates != 0].tolist()
    assert gated.prune() == live == gated.rank
    assert float(gated.scaling) == scaling
    assert gated.gates[gated.gates != 0].tolist() == kept
    groups = getattr(layer, "groups", 1)
    assert len(gated.gates) == gated.A.weight.shape[0] == groups * gated.B.weight.shape[1]
    if groups == 1:
        assert len(gated.gates) == max(live, 1)
    torch.testing.assert_close(gated(x), before, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in (gated.A.weight, gated.B.weight, gated.gates))


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.floats(0, 2, width=32))
@SETTINGS
def test_prox_minimises_its_objective(values: list[float], threshold: float) -> None:
    gated = Gated(nn.Linear(8, 8))
    gated.activate(len(values))
    start = torch.tensor(values, dtype=torch.float64)
    with torch.no_grad():
        gated.gates.copy_(start)
    gated.prox(threshold)
    found = gated.gates.detach().double()
    assert gated.rank == int((start.abs() > threshold).sum())

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (x - start) ** 2 + threshold * x.abs()

    for other in torch.linspace(-5, 5, 1001, dtype=torch.float64):
        assert (objective(found) <= objective(other) + 1e-6).all()


def test_a_threshold_of_zero_leaves_the_gates_where_they_are() -> None:
    gated = Gated(nn.Linear(8, 8))
    gated.activate(5, gates="normal")
    before = gated.gates.detach().clone()
    gated.prox(0.0)
    assert torch.equal(gated.gates, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_the_layers(dtype: torch.dtype) -> None:
    gated = Gated(nn.Linear(6, 4, dtype=dtype))
    gated.activate(3)
    assert {p.dtype for p in gated.parameters()} == {dtype}
    learn(gated)
    x = torch.randn(5, 6, dtype=dtype)
    before = gated(x)
    assert before.dtype == dtype
    assert gated.deactivate().weight.dtype == dtype
    worst = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(gated(x), before, atol=worst, rtol=worst)
    elsewhere = Gated(nn.Conv2d(3, 4, 3, device="meta"))
    elsewhere.activate(2)
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}


def test_the_merge_is_formed_in_fp32_and_rounded_once() -> None:
    layer = nn.Linear(16, 16, dtype=torch.bfloat16)
    gated = Gated(layer)
    gated.activate(16, alpha=4.0)
    learn(gated)
    exact = layer.weight.double() + (gated.B.weight.double() * (0.25 * gated.gates.double())) @ gated.A.weight.double()
    gated.deactivate()
    assert (layer.weight.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_it_runs_under_autocast_in_both_modes() -> None:
    gated = Gated(nn.Linear(6, 4))
    gated.activate(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated(torch.randn(2, 6))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert gated.B.weight.grad.dtype == torch.float32
    gated.eval()
    assert not gated.A.training and not gated.layer.training


@given(ranked())
@SETTINGS
def test_a_copy_is_independent(case: Any) -> None:
    layer, x, rank = case
    gated = Gated(layer)
    gated.activate(rank)
    learn(gated)
    copied = copy.deepcopy(gated)
    before = gated(x)
    assert torch.equal(copied(x), before)
    copied.deactivate()
    assert torch.equal(gated(x), before)
    assert copied.layer.weight.requires_grad and not layer.weight.requires_grad


@given(ranked(), st.booleans())
@SETTINGS
def test_a_state_dict_brings_its_structure(case: Any, pruned: bool) -> None:
    layer, x, rank = case
    fresh = Gated(copy.deepcopy(layer))
    inactive = copy.deepcopy(fresh.state_dict())
    gated = Gated(layer)
    gated.activate(rank, alpha=3.0)
    learn(gated)
    if pruned:
        gated.prox(0.5)
        gated.prune()
    fresh.load_state_dict(gated.state_dict())
    assert torch.equal(fresh(x), gated(x))
    assert fresh.rank == gated.rank and torch.equal(fresh.scaling, gated.scaling)
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in gated.named_parameters()
    }
    same = fresh.gates
    fresh.load_state_dict(gated.state_dict())
    assert fresh.gates is same  # the optimizer's Parameters stay where the structure does
    fresh.load_state_dict(inactive)
    assert not fresh.active
    assert all(p.requires_grad for p in fresh.parameters())


def test_a_part_of_a_state_changes_no_structure() -> None:
    model = nn.Sequential(Gated(nn.Linear(4, 4)), nn.Linear(4, 2))
    model[0].activate(2)
    model.load_state_dict({"1.weight": torch.zeros(2, 4)}, strict=False)
    assert model[0].rank == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rank": 0}, "max_rank must be a whole number from 1 to 4 for this layer, not 0"),
        ({"max_rank": 5}, "max_rank must be a whole number from 1 to 4"),
        ({"max_rank": 1.5}, "not 1.5"),
        ({"max_rank": 2, "alpha": 0}, "alpha must be above 0"),
        ({"max_rank": 2, "alpha": float("inf")}, "alpha must be above 0 and finite"),
        ({"max_rank": 2, "init": "zeros"}, "init must be one of normal, kaiming, not 'zeros'"),
        ({"max_rank": 2, "gates": "zeros"}, "gates must be one of ones, normal, not 'zeros'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    gated = Gated(nn.Linear(6, 4))
    with pytest.raises(InputError) as caught:
        gated.activate(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not gated.active and gated.layer.weight.requires_grad


def test_the_verbs_are_refused_out_of_turn() -> None:
    gated = Gated(nn.Linear(6, 4))
    for verb in (gated.deactivate, gated.prune, lambda: gated.prox(0.1)):
        with pytest.raises(InputError, match="not active: activate it first"):
            verb()
    gated.activate(2)
    with pytest.raises(InputError, match="already active: deactivate it first"):
        gated.activate(2)
    with pytest.raises(InputError, match="the threshold must be 0 or more, not -0.1"):
        gated.prox(-0.1)
    gated.deactivate()
    gated.activate(3)
    assert gated.rank == 3


def test_the_rank_of_a_convolution_may_go_up_to_its_unfolded_width() -> None:
    assert Gated(nn.Conv2d(3, 64, 3)).limit == 27
    assert Gated(nn.Conv2d(64, 64, 3, groups=64)).limit == 64
    with pytest.raises(InputError, match="a multiple of the layer's 2 groups, not 3"):
        Gated(nn.Conv2d(4, 4, 3, groups=2)).activate(3)


def test_what_cannot_be_wrapped_is_refused() -> None:
    for layer in (nn.Embedding(3, 3), nn.ConvTranspose2d(3, 3, 3), nn.LayerNorm(3), Gated(nn.Linear(2, 2))):
        with pytest.raises(InputError, match="cannot be gated; these can: Linear, Conv1d, Conv2d, Conv3d"):
            Gated(layer)
    with pytest.raises(InputError, match="is computed"):
        Gated(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10))
    )


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (nn.Linear, ["3.0", "3.2"]),
        ([nn.Conv2d, nn.Linear], ["0", "3.0", "3.2"]),
        (["3.0", "0"], ["0", "3.0"]),
        ("2", ["3.2"]),
        ([nn.modules.conv._ConvNd, "3.2"], ["0", "3.2"]),
    ],
)
def test_layers_of_a_model_are_wrapped_by_name_or_type_and_put_back(targets: Any, names: list[str]) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    if targets == "2":  # `2` is also the name of the nn.Flatten, which cannot be wrapped
        with pytest.raises(InputError, match="^2: a Flatten cannot be gated"):
            Gated.wrap(model, targets)
        targets = "3.2"
    before, structure = model(x), str(model)
    keys = list(model.state_dict())
    bare = {name: model.get_submodule(name) for name in names}
    wrapped = Gated.wrap(model, targets)
    assert sorted(wrapped) == names
    assert all(model.get_submodule(name) is gated for name, gated in wrapped.items())
    assert torch.equal(model(x), before)
    for gated in wrapped.values():
        gated.activate(2)
        learn(gated)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    back = Gated.unwrap(model)
    assert back == bare
    assert (str(model), list(model.state_dict())) == (structure, keys)
    torch.testing.assert_close(model(x), after, atol=1e-4, rtol=1e-5)
    assert Gated.unwrap(model) == {}


def test_wrapping_twice_passes_over_what_is_wrapped() -> None:
    model = network()
    Gated.wrap(model, nn.Conv2d)
    assert sorted(Gated.wrap(model, [nn.Linear])) == ["3.0", "3.2"]
    with pytest.raises(InputError, match="Linear matches no layer of Sequential"):
        Gated.wrap(model, nn.Linear)


def test_a_layer_used_in_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    wrapped = Gated.wrap(model, nn.Linear)
    assert sorted(wrapped) == ["a", "b"] and model["a"] is model["b"]
    model["a"].activate(2)
    Gated.unwrap(model)
    assert model["a"] is shared and model["b"] is shared


def test_a_tied_weight_is_refused_and_nothing_is_wrapped() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(InputError, match="head shares its weight with embedding"):
        Gated.wrap(model, nn.Linear)
    assert not any(isinstance(each, Gated) for each in model.modules())
    assert sorted(Gated.wrap(model, "first")) == ["first"]


def test_wrong_targets_are_refused() -> None:
    model = nn.Sequential()
    model.add_module("projection", nn.Linear(3, 3))
    with pytest.raises(InputError, match='projektion matches no layer of Sequential \\(did you mean "projection"'):
        Gated.wrap(model, "projektion")
    with pytest.raises(InputError, match="no targets are given"):
        Gated.wrap(model, [])
    with pytest.raises(InputError, match=r"the model itself is a Linear: wrap it with Gated\(model\)"):
        Gated.wrap(nn.Linear(3, 3), nn.Linear)
    with pytest.raises(InputError, match="the model itself is the wrapper: call its deactivate"):
        Gated.unwrap(Gated(nn.Linear(3, 3)))


def test_the_layers_attributes_are_there() -> None:
    gated = Gated(nn.Linear(6, 4))
    assert (gated.in_features, gated.out_features) == (6, 4)
    assert gated.weight is gated.layer.weight and gated.bias is gated.layer.bias
    assert repr(gated).startswith("Gated(\n  inactive")
    gated.activate(2)
    assert "rank 2 of 2" in repr(gated)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gated.nothing


def test_attention_that_reads_the_weight_of_its_projection_sees_the_factors() -> None:
    """nn.MultiheadAttention never calls its out_proj, and a TransformerEncoderLayer has a way that calls no layer."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    for gated in Gated.wrap(block, nn.Linear).values():
        gated.activate(2)
        learn(gated)
    slow = block(x)
    slow.sum().backward()
    assert block.self_attn.out_proj.gates.grad.abs().sum() > 0
    with torch.no_grad():
        fast = block(x)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    Gated.unwrap(block)
    torch.testing.assert_close(block(x), slow, atol=1e-5, rtol=1e-5)


def test_training_with_the_l1_norm_finds_the_rank_that_is_needed() -> None:
    """The target differs from the layer by a matrix of rank 2: of 6 gates λ leaves few, and without λ all stay."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 10)
    x = torch.randn(256, 12)
    change = torch.linalg.qr(torch.randn(10, 2)).Q @ torch.linalg.qr(torch.randn(12, 2)).Q.T
    with torch.no_grad():
        target = layer(x) + x @ (3 * change).T
    ranks, losses = {}, {}
    for weight in (0.0, 0.1):
        gated = Gated(copy.deepcopy(layer))
        torch.manual_seed(1)
        gated.activate(6, alpha=6.0)
        rate = 0.05
        optimizers = [
            torch.optim.Adam([gated.A.weight, gated.B.weight], lr=0.02),
            torch.optim.SGD([gated.gates], lr=rate),
        ]
        for _ in range(300):
            loss = (gated(x) - target).pow(2).mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            gated.prox(rate * weight)
        ranks[weight], losses[weight] = gated.rank, loss.item()
        before = gated(x)
        assert gated.prune() == len(gated.gates) == ranks[weight]
        torch.testing.assert_close(gated.deactivate()(x), before, atol=1e-4, rtol=1e-4)
    assert ranks[0.0] == 6
    assert 2 <= ranks[0.1] < 6
    start = (layer(x) - target).pow(2).mean().item()
    assert losses[0.0] < 0.001 * start and losses[0.1] < 0.01 * start


def test_it_compiles_and_checkpoints() -> None:
    gated = Gated(nn.Conv1d(4, 6, 3))
    gated.activate(3)
    learn(gated)
    x = torch.randn(2, 4, 9)
    compiled = torch.compile(gated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gated(x))
    out = torch.utils.checkpoint.checkpoint(gated, x, use_reentrant=False)
    out.sum().backward()
    assert gated.gates.grad is not None


def test_its_example_runs() -> None:
    with torch.random.fork_rng():
        assert doctest.testmod(module).failed == 0


def test_it_needs_neither_transformers_nor_peft() -> None:
    script = (
        "import sys, torch\n"
        "from rankwise.nets.gated import Gated\n"
        "layer = Gated(torch.nn.Linear(4, 4)); layer.activate(2); layer.prox(0.1); layer.deactivate()\n"
        "print(sorted(name for name in ('transformers', 'peft', 'accelerate') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
