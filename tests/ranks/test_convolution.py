"""Sites on convolutions: read as matrices they are what linear sites are, and PEFT's files know no difference."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutput

import rankwise as rw
from rankwise.methods import build
from rankwise.ranks import RankPlan, ranks, sites
from rankwise.ranks.sites import omega

TARGETS = ["wide", "strided", "point", "linear"]
COSTS = {"wide": 3 * 9 + 8, "strided": 8 * 6 + 12, "point": 12 + 10, "linear": 10 + 6}
METHODS = {
    "lora": {"rank": 2},
    "lora-fa": {"rank": 2},
    "sora": {"rank": 4, "sparsity": 20.0, "gate_rate": 0.02, "gates": "normal"},
    "simplex-lora": {"rank": 2, "every": 2, "times": 2, "omega_rate": 20.0},
    "fat-lora": {"rank": 2, "every": 2, "times": 2, "omega_rate": 20.0},
    "weight-lora": {"rank": 2, "keep": 2, "start": 2, "every": 4},
    "random-lora": {"rank": 2, "keep": 2},
    "spaced-lora": {"rank": 2, "mean_rank": 0.6},
    "squeeze": {"rank": 2, "every": 2},
    "dora": {"rank": 2},
}
every_method = pytest.mark.parametrize("name", METHODS)


class Net(nn.Module):
    """Images (n, 3, 8, 9) to three classes, through one convolution of each make that can be adapted."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.point = nn.Conv2d(12, 10, 1)
        self.linear = nn.Linear(10, 6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, pixel_values, labels=None):
        x = pixel_values
        for layer in (self.wide, self.strided, self.point):
            x = layer(x).tanh()
        logits = self.classifier(self.linear(x.mean(dim=(2, 3))).tanh())
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def method(name, **more):
    return build({"name": name, "targets": TARGETS, **METHODS.get(name, {}), **more})


def attached(name, **more):
    torch.manual_seed(1)
    return method(name, **more).attach(Net(), head=["classifier"])


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 8, 9, generator=draw)
    return {"pixel_values": images, "labels": images.mean(dim=(2, 3)).argmax(dim=1)}


@torch.no_grad()
def logits(model):
    return model.eval()(batch(99)["pixel_values"]).logits


def train(model, optimizer, steps, start=0):
    model.train()
    losses = []
    for step in range(start, start + steps):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def spread(model, std=0.3):
    """Give every B values, as if something had been learnt."""
    torch.manual_seed(3)
    for site in sites(model):
        if site.present:
            torch.nn.init.normal_(site.B, std=std)
    return model


def stock(rank=4, targets=TARGETS, **options):
    torch.manual_seed(1)
    return spread(get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), **options)))


def delta(site):
    """What the site adds to W, by PEFT's own reckoning, as a matrix."""
    return site.layer.get_delta_weight("default").detach().flatten(1).double()


# --- what a site on a convolution is ---------------------------------------------------------------------------------


def test_sites_count_each_place_of_a_kernel_as_an_input():
    model = stock()
    assert {s.name: s.cost for s in sites(model)} == COSTS
    assert {s.name: s.limit for s in sites(model)} == {"wide": 8, "strided": 12, "point": 10, "linear": 6}
    for site in sites(model):
        product = site.scaling * site.B.detach().flatten(1) @ site.A.detach().flatten(1)
        assert torch.allclose(delta(site), product.double(), atol=1e-6)
        assert site.W.shape == (site.out_features, site.in_features)
        assert site.parameters == site.A.numel() + site.B.numel()
    assert rw.rank_report(model).total == sum(p.numel() for p in model.parameters() if p.requires_grad)


@every_method
def test_counts_are_exact_and_the_start_leaves_the_outputs(name):
    model = attached(name)
    trains = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    rank = {"sora": 4}.get(name, 2)
    uniform = rank * sum(COSTS.values())
    found = rw.rank_report(model)
    if name in ("random-lora", "spaced-lora"):
        assert trains == found.total == sum(r * COSTS[n] for n, r in ranks(model).items())
    else:
        extra = {"simplex-lora": 4, "fat-lora": 4, "weight-lora": 4, "sora": 4 * rank, "dora": 8 + 12 + 10 + 6}
        frozen = rank * (27 + 48 + 12 + 10) if name == "lora-fa" else 0
        assert trains == uniform + extra.get(name, 0) - frozen
    if name != "sora":
        assert found.total == sum(r * COSTS[n] for n, r in ranks(model).items())
    close = {"atol": 1e-5} if name == "dora" else {"atol": 0, "rtol": 0}
    assert torch.allclose(logits(model), logits(Net()), **close)


def test_all_linear_is_linear_and_convolutions_are_named():
    def found(targets):
        return list(ranks(rw.LoRA(rank=2, targets=targets).attach(Net(), head=["classifier"])))

    assert found("all-linear") == ["linear"]
    assert found("all-linear+wide") == ["wide", "linear"]
    assert found(["strided"]) == ["strided"]
    assert found("wide+point") == ["wide", "point"]


# --- ranks change ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shrinking_error_is_eckart_youngs(rank):
    model = stock()
    before = {site.name: delta(site) for site in sites(model)}
    rw.resize(model, dict.fromkeys(ranks(model), rank))
    for site in sites(model):
        best = torch.linalg.svdvals(before[site.name])[rank:].square().sum().sqrt()
        assert site.rank == rank and site.layer.r["default"] == rank
        assert (before[site.name] - delta(site)).norm() == pytest.approx(best.item(), rel=1e-4)


def test_growing_and_the_same_rank_change_nothing():
    model = stock()
    before, parameters = logits(model), list(model.parameters())
    products = {site.name: site.B.detach().flatten(1) @ site.A.detach().flatten(1) for site in sites(model)}
    assert rw.resize(model, ranks(model)) == {}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    rw.resize(model, dict.fromkeys(ranks(model), 6))
    assert torch.allclose(logits(model), before, atol=1e-6)
    for site in sites(model):
        assert site.A.shape[0] == site.B.shape[1] == 6 and not site.B[:, 4:].any()
        assert torch.equal(site.B[:, :4].flatten(1) @ site.A[:4].flatten(1), products[site.name])
        new = site.A[4:].detach().flatten(1)
        assert torch.allclose(new @ new.T, torch.eye(2), atol=1e-5)


def test_an_emptied_site_costs_nothing_and_can_come_back_and_learn():
    model = stock()
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.requires_grad], "name": "adapter"}])
    train(model, optimizer, 1)
    rw.resize(model, {"wide": 0, "strided": 0}, optimizer)
    assert rw.rank_report(model).total == sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    without = logits(model)
    rw.resize(model, {"wide": 3, "strided": 2})
    assert torch.equal(logits(model), without)
    wide, strided = sites(model)[:2]
    assert wide.A.shape == (3, 3, 3, 3) and wide.B.shape == (8, 3, 1, 1) and strided.A.shape == (2, 8, 3, 2)
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == trained
    train(model, optimizer, 2)
    assert wide.B.any() and strided.B.any()


def test_merging_an_emptied_site_keeps_the_outputs_and_a_state_from_before_undoes_it():
    model = spread(attached("lora"))
    state = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    before, weight = logits(model), sites(model)[0].W.clone()
    rw.resize(model, RankPlan({"wide": 0, "strided": 0}, empty="merge"))
    assert torch.allclose(logits(model), before, atol=1e-5)
    model.load_state_dict(state, strict=False)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert torch.allclose(sites(model)[0].W, weight, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT, of layers that hold no adapter
def test_peft_merges_and_unmerges_resized_sites():
    model = stock()
    rw.resize(model, {"wide": 1, "strided": 7, "point": 0, "linear": 2})
    before = logits(model)
    assert torch.allclose(logits(copy.deepcopy(model).merge_and_unload()), before, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_moments_are_reset_or_carried(moments, rank):
    model = stock()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, 2)
    rw.resize(model, RankPlan(dict.fromkeys(TARGETS, rank), moments=moments), optimizer)
    for site in sites(model):
        for p in (site.A, site.B):
            if moments == "reset":
                assert p not in optimizer.state
            else:
                assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == p.shape
                assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()
    before = [site.B.detach().clone() for site in sites(model)]
    train(model, optimizer, 1)
    assert not any(torch.equal(site.B, old) for site, old in zip(sites(model), before, strict=True))


def test_carried_moments_are_the_gradient_of_the_new_factors():
    """After one step of plain averaging the first moment is the gradient, so it must be carried to the new gradient."""
    torch.manual_seed(0)
    model = stock().double()
    data = batch()
    data["pixel_values"] = data["pixel_values"].double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.5)
    with torch.no_grad():  # of rank 2, so that a cut to 2 changes no output
        for site in sites(model):
            site.B[:, 2:] = 0
    model(**data).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    rw.resize(model, RankPlan(dict.fromkeys(TARGETS, 2), moments="keep"), optimizer)
    model(**data).loss.backward()
    for site in sites(model):
        for p in (site.A, site.B):
            assert torch.allclose(optimizer.state[p]["momentum_buffer"], p.grad, atol=1e-9)


def test_wrong_ranks_are_refused():
    model = stock()
    with pytest.raises(rw.InputError, match="rank 9 does not fit wide: it must be 0 to 8"):
        rw.resize(model, {"wide": 9})
    with pytest.raises(rw.InputError, match="rank 9 is too large for wide, which allows at most 8"):
        rw.LoRA(rank=9, targets=["wide"]).attach(Net())


# --- methods, from the start to the file -----------------------------------------------------------------------------


@every_method
def test_folding_keeps_the_outputs_and_saving_gives_a_plain_adapter(name, tmp_path):
    model = attached(name)
    train(model, rw.SimplexAdam(method(name), model, lr=1e-2), 3)
    before = logits(model)
    assert not torch.equal(before, logits(Net()))
    rw.save(model, tmp_path / "adapter")
    assert torch.equal(logits(model), before)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path / "adapter"))
    assert torch.allclose(logits(loaded), before, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), before, atol=1e-5)
    folded = method(name).fold(model)
    if name != "fat-lora":  # which sets its ω to 1
        assert torch.allclose(logits(folded), before, atol=1e-5)
    assert all(site.scale is None for site in sites(folded))
    if name != "dora":
        trains = sum(p.numel() for n, p in folded.named_parameters() if "lora_" in n)
        assert trains == rw.rank_report(folded).total


def test_gates_multiply_units_and_closed_ones_are_cut_exactly(tmp_path):
    model = spread(attached("sora"))
    with torch.no_grad():
        for site in sites(model):
            site.gates.copy_(torch.tensor([[0.0], [2.0], [0.0], [-0.5]]))
    before = logits(model)
    assert set(ranks(model).values()) == {2} and rw.rank_report(model).total == 2 * sum(COSTS.values())
    rw.save(model, tmp_path / "adapter")
    again = rw.load(Net(), tmp_path / "adapter")
    assert set(ranks(again).values()) == {2} and torch.allclose(logits(again), before, atol=1e-6)
    method("sora").fold(model)
    assert torch.allclose(logits(model), before, atol=1e-6)
    for site in sites(model):
        A, B = site.layer.lora_A["default"], site.layer.lora_B["default"]
        assert A.weight.shape[0] == B.weight.shape[1] == 2
        if site.name != "linear":
            assert A.out_channels == B.in_channels == 2


@pytest.mark.parametrize("name", ["sora", "simplex-lora"])
def test_folding_carries_the_moments_of_b(name):
    searching = method(name, **({"sparsity": 0.0} if name == "sora" else {}))
    torch.manual_seed(1)
    model = searching.attach(Net(), head=["classifier"])
    optimizer = rw.SimplexAdam(searching, model, lr=1e-2)
    train(model, optimizer, 3 if name == "sora" else 1)
    with torch.no_grad():
        if name == "sora":
            for site in sites(model):
                site.gates[0] = 0
        else:
            omega(model).copy_(torch.tensor([0.5, 1.5, 1.2, 0.8]))
    cut = 1 if name == "sora" else 0
    old_A = [optimizer.state[site.A]["exp_avg"][cut:].clone() for site in sites(model)]
    old_B = [optimizer.state[site.B]["exp_avg"][:, cut:].clone() for site in sites(model)]
    values = [site.scale.value.detach().expand(site.rank, 1)[cut:].flatten() for site in sites(model)]
    searching.fold(model)
    for site, a, b, value in zip(sites(model), old_A, old_B, values, strict=True):
        assert torch.equal(optimizer.state[site.A]["exp_avg"], a)
        carried = b / value.reshape(1, -1, *[1] * (b.dim() - 2))
        assert torch.allclose(optimizer.state[site.B]["exp_avg"], carried) and carried.any()
    train(model, optimizer, 1, start=1)


def test_a_search_moves_rank_between_convolutions_within_its_budget():
    model = attached("simplex-lora")
    optimizer = rw.SimplexAdam(method("simplex-lora"), model, lr=1e-2)
    train(model, optimizer, 1)
    with torch.no_grad():
        omega(model).copy_(torch.tensor([0.0, 2.0, 1.0, 1.0]))
    optimizer.param_groups[-1]["lr"] = 1e-9  # ω stays where it was put
    train(model, optimizer, 1, start=1)
    found = ranks(model)
    assert found["wide"] == 0 and found["strided"] > 2
    assert rw.rank_report(model).total <= 2 * sum(COSTS.values())
    train(model, optimizer, 3, start=2)
    assert omega(model) is None


@pytest.mark.parametrize("name", ["lora", "lora-fa", "sora", "simplex-lora", "weight-lora"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_run_goes_on_bit_for_bit(name, cut, tmp_path):
    def start():
        model = attached(name)
        return model, rw.SimplexAdam(method(name), model, lr=1e-2)

    model, optimizer = start()
    whole = train(model, optimizer, 7)
    half, its = start()
    first = train(half, its, cut)
    rw.save_checkpoint(tmp_path / "checkpoint", half, its)
    resumed, again = start()
    assert rw.load_checkpoint(tmp_path / "checkpoint", resumed, again) == cut
    assert ranks(resumed) == ranks(half)
    assert first + train(resumed, again, 7 - cut, start=cut) == whole
    assert ranks(resumed) == ranks(model) and torch.equal(logits(resumed), logits(model))


def test_a_loaded_adapter_can_be_resized_and_saved_again(tmp_path):
    model = stock()
    rw.resize(model, {"wide": 1, "strided": 0, "point": 6})
    rw.save(model, tmp_path / "first")
    again = rw.load(Net(), tmp_path / "first")
    assert ranks(again) == {"wide": 1, "point": 6, "linear": 4}
    rw.resize(again, {"point": 2})
    rw.save(again, tmp_path / "second")
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path / "second"))
    assert torch.allclose(logits(loaded), logits(again), atol=1e-6)


# --- starts ----------------------------------------------------------------------------------------------------------


def test_the_svd_start_is_the_best_approximation_of_the_kernel():
    model = attached("lora", init="svd")
    for site in sites(model):
        rest = site.W - site.B.detach().flatten(1) @ site.A.detach().flatten(1)
        best = torch.linalg.svdvals(site.W)[2:].square().sum().sqrt()
        assert rest.norm().item() == pytest.approx(best.item(), rel=1e-4)


def test_a_residual_start_keeps_the_function_and_saving_undoes_it(tmp_path):
    model = attached("lora", init="svd_residual", pull=0.1)
    assert torch.allclose(logits(model), logits(Net()), atol=1e-5)
    optimizer = rw.SimplexAdam(method("lora", init="svd_residual", pull=0.1), model, lr=1e-2)
    train(model, optimizer, 2)
    rw.save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    rw.save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path / "adapter"))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert not torch.allclose(logits(model), logits(Net()), atol=1e-3)
    again = attached("lora", init="svd_residual", pull=0.1)
    rw.load_checkpoint(tmp_path / "checkpoint", again, rw.SimplexAdam(method("lora", pull=0.1), again, lr=1e-2))
    assert torch.equal(logits(again), logits(model))


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(4, 4, 2), "target 'conv' is a transposed convolution, conv, for which PEFT has no LoRA"),
        (nn.Conv2d(4, 4, 3, groups=2), "conv has 2 groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "conv is dilated"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "conv has reflect padding"),
    ],
)
def test_convolutions_that_peft_does_not_adapt_are_refused_in_one_line(layer, message):
    model = nn.Sequential()
    model.add_module("conv", layer)
    model.add_module("linear", nn.Linear(4, 4))
    with pytest.raises(rw.InputError, match=message) as caught:
        rw.LoRA(rank=2, targets=["conv"]).attach(model)
    assert "\n" not in str(caught.value)
    assert list(ranks(rw.LoRA(rank=2).attach(model))) == ["linear"]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolutions_that_peft_adapted_are_no_sites_and_are_saved_as_they_are(tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Tanh(), nn.Conv2d(8, 8, 1))

    model = get_peft_model(made(), LoraConfig(r=4, target_modules=["0", "2"])).eval()
    with torch.no_grad():
        for layer in ("0", "2"):
            torch.nn.init.normal_(model.get_submodule(f"base_model.model.{layer}.lora_B.default").weight)
        assert list(ranks(model)) == ["2"]
        rw.resize(model, {"2": 2})
        rw.save(model, tmp_path / "adapter")
        x = torch.randn(2, 4, 5, 5)
        loaded = PeftModel.from_pretrained(made(), str(tmp_path / "adapter"))
        assert torch.allclose(loaded(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pissa", "rank": 2}, "wide is a convolution, but init=pissa is for linear layers only"),
        (
            {"name": "adalora", "rank": 2, "init_rank": 3, "total": 10, "start": 1, "settle": 2},
            "but adalora is for linear",
        ),
        ({"name": "lora-fa", "rank": 2, "projected": True}, "but projected is for linear"),
    ],
)
def test_methods_that_know_no_convolutions_say_so_in_one_line(options, message):
    model = Net()
    with pytest.raises(rw.InputError, match=message) as caught:
        build({**options, "targets": TARGETS}).attach(model, head=["classifier"])
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in model.named_parameters())  # and the model is as it was


def test_a_network_of_convolutions_alone_wants_them_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(rw.InputError, match="name its convolutions"):
        rw.LoRA(rank=2).attach(model)
    with pytest.raises(rw.InputError, match="matches no linear layer or convolution"):
        rw.LoRA(rank=2, targets=["1"]).attach(model)
    assert list(ranks(rw.LoRA(rank=2, targets=["2"]).attach(model))) == ["2"]


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions_do_as_well(dims, tmp_path):
    kind, image = {1: (nn.Conv1d, (8,)), 3: (nn.Conv3d, (4, 5, 4))}[dims]

    def made():
        torch.manual_seed(0)
        return nn.Sequential(kind(3, 8, 3, padding=1), nn.Tanh(), kind(8, 6, 2, stride=2))

    torch.manual_seed(1)
    x = torch.randn(2, 3, *image)
    model = rw.SoRA(rank=4, targets=["0", "2"]).attach(made())
    spread(model)
    with torch.no_grad():
        for site in sites(model):
            site.gates[1] = 0
        before = model.eval()(x)
        rw.save(model, tmp_path / "adapter")
        assert torch.allclose(PeftModel.from_pretrained(made(), str(tmp_path / "adapter"))(x), before, atol=1e-6)
        rw.SoRA().fold(model)
        assert torch.allclose(model(x), before, atol=1e-6)
        rw.resize(model, {"0": 5, "2": 0})
        rw.resize(model, {"2": 2})
    assert sites(model)[0].cost == 3 * 3**dims + 8 and model(x).isfinite().all()
