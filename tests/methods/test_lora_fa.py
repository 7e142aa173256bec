"""LoRA-FA: A stays for ever, a layer keeps A x and not x, and PEFT's projected update trains and resumes like ours."""

import copy

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.pytorch_utils import Conv1D

import models
import rankwise as rw
from rankwise.methods import build
from rankwise.optim.projected_adam import ProjectedAdam
from rankwise.ranks import sites

every_shape = pytest.mark.parametrize("shape", models.SHAPES)


def made(name="lora-fa", **more):
    return build({"name": name, "rank": 2, "alpha": 4.0, **more})


def attached(method, shape="bert", seed=1):
    torch.manual_seed(seed)
    return method.attach(models.model(shape), head=models.head(shape))


def stepper(method, model, **more):
    kind = ProjectedAdam if getattr(method, "projected", False) else rw.SimplexAdam
    return kind(method, model, lr=1e-2, **more)


# --- A is frozen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["disable_adapter", "set_adapter"])
def test_A_stays_frozen_when_the_adapter_is_switched(switch):
    method = made()
    model = attached(method)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    if switch == "set_adapter":
        model.set_adapter("default")
    else:
        with model.disable_adapter():
            models.logits(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert not any(site.A.requires_grad for site in sites(copy.deepcopy(model)))


@every_shape
@pytest.mark.parametrize("projected", [False, True])
def test_A_stays_bit_for_bit_and_every_B_trains(projected, shape):
    method = made(projected=projected)
    model = attached(method, shape)
    before = [(site.A.detach().clone(), site.B.detach().clone()) for site in sites(model)]
    models.train(model, stepper(method, model, weight_decay=0.1), 10)
    for site, (A, _) in zip(sites(model), before, strict=True):
        assert torch.equal(site.A, A) and not site.A.requires_grad and site.A.grad is None
    assert sum(not torch.equal(site.B, B) for site, (_, B) in zip(sites(model), before, strict=True)) > len(before) / 2


@every_shape
def test_what_trains_is_out_times_r_of_every_site(shape):
    model = attached(made(), shape)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert all(".lora_B." in name for name in trains)
    assert sum(p.numel() for p in trains.values()) == sum(site.out_features * 2 for site in sites(model))


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_the_counts_of_roberta_base(rank):
    targets = ["query", "key", "value", "attention.output.dense"]
    with torch.device("meta"):
        base = RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, num_labels=2, type_vocab_size=1))
        model = build({"name": "lora-fa", "rank": rank, "targets": targets}).attach(base, head=["classifier"])
    assert len(sites(model)) == 48
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 36_864 * rank + 592_130


# --- what is kept for the backward pass ------------------------------------------------------------------------------


class Kept(saved_tensors_hooks):
    """The tensors that autograd saves while this is on, those of `model` itself aside."""

    def __init__(self, model):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                self.tensors.append(tensor)
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def shapes(self):
        return {tuple(tensor.shape) for tensor in self.tensors}

    @property
    def bytes(self):
        """Each storage counted once."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}.values())


LAYERS = {
    "Linear": lambda: nn.Linear(12, 20),
    "Linear without bias": lambda: nn.Linear(12, 20, bias=False),
    "Conv1D": lambda: Conv1D(20, 12),
}


def kept_by_one_layer(layer, name, **more):
    """Shapes that a layer of 12 inputs and 20 outputs keeps, with rank 3, of an x that needs a gradient itself."""
    torch.manual_seed(0)
    model = build({"name": name, "rank": 3, "targets": ["0"], **more}).attach(nn.Sequential(LAYERS[layer]())).train()
    for site in sites(model):
        nn.init.normal_(site.B)
    x = torch.randn(2, 5, 12, requires_grad=True)
    kept = Kept(model)
    with kept:
        out = model(x)
    out.sum().backward()
    assert sites(model)[0].B.grad.abs().max() > 0 and x.grad is not None
    shapes = {(shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape for shape in kept.shapes}
    return {(10, wide) if tall == 10 else (10, tall) for tall, wide in shapes}  # the fast layer keeps (A x)ᵀ


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("more", [{}, {"init": "svd_residual"}, {"projected": True}], ids=str)
def test_a_layer_keeps_Ax_and_not_x(layer, more):
    kept = kept_by_one_layer(layer, "lora-fa", **more)
    assert kept == {(10, 3)}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_of_lora_keeps_x_too(layer):
    assert kept_by_one_layer(layer, "lora") == {(10, 3), (10, 12)}


@pytest.mark.parametrize("layer", LAYERS)
def test_with_dropout_a_layer_keeps_the_mask(layer):
    """As wide as x, so nothing is saved there; the file's head says so."""
    assert kept_by_one_layer(layer, "lora-fa", dropout=0.5) == {(10, 3), (10, 12)}


@every_shape
def test_a_whole_model_keeps_less_than_with_lora(shape):
    def kept(name):
        model = attached(made(name), shape).train()
        kept = Kept(model)
        with kept:
            model(**models.batch())
        return kept.bytes

    assert kept("lora-fa") < kept("lora")


# --- the projected update --------------------------------------------------------------------------------------------


@every_shape
def test_projected_takes_the_very_steps_of_peft(shape):
    """PEFT's optimizer puts everything under one weight decay, so there is none here."""
    method = made(projected=True, init="normal")
    ours, theirs = attached(method, shape), attached(method, shape)
    torch.manual_seed(2)
    a = models.train(ours, ProjectedAdam(method, ours, lr=1e-2, eps=1e-6), 5)
    torch.manual_seed(2)
    b = models.train(theirs, create_lorafa_optimizer(theirs, r=2, lora_alpha=4, lr=1e-2), 5)
    assert a == b
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_first_step_goes_along_the_projected_gradient():
    """With β1 = 0 and a large ε the step is -lr g / ε, so g can be read off: s⁻² ∂L/∂B (A Aᵀ)⁻¹, in bfloat16."""
    method = made(projected=True)
    model = attached(method)
    model(**models.batch()).loss.backward()
    optimizer = ProjectedAdam(method, model, lr=1e4, betas=(0.0, 0.0), eps=1e4)
    expected = [s.B.grad @ torch.linalg.inv(s.A @ s.A.T) / s.scaling**2 for s in sites(model)]
    optimizer.step()
    for site, g in zip(sites(model), expected, strict=True):
        assert g.norm() > 0
        assert (-site.B - g).norm() <= 0.02 * g.norm()


def test_projected_decays_weights_but_no_biases():
    method = made(projected=True)
    optimizer = stepper(method, attached(method), weight_decay=0.1)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"adapter": 0.1, "weights": 0.1, "biases": 0.0}
    assert all("bias" in name for g in optimizer.param_groups if g["name"] == "biases" for name in g["names"])


def test_a_layer_that_had_no_part_in_the_loss_is_left_alone():
    method = made(projected=True)
    model = method.attach(models.Half(4))
    optimizer = stepper(method, model)
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    used, idle = sites(model)
    assert used.B.any() and not idle.B.any()


def test_a_closure_is_called_with_gradients_on():
    method = made(projected=True)
    model = attached(method)
    optimizer = stepper(method, model)

    def closure():
        loss = model(**models.batch()).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad and sites(model)[0].B.any()


def test_what_projected_cannot_do_gets_one_clear_line():
    with pytest.raises(rw.InputError, match="pull must be 0 with projected") as caught:
        made(projected=True, pull=0.1)
    assert "\n" not in str(caught.value)
    method = made(projected=True)
    model = attached(method)
    with pytest.raises(rw.InputError, match="ProjectedAdam"):  # else it would train without the projection
        models.train(model, rw.SimplexAdam(method, model), 1)


def test_a_rank_change_is_refused_and_not_half_followed():
    method = made(projected=True)
    for plan in ({"rank": 1}, {"rank": 0}):
        model = attached(method)
        optimizer = stepper(method, model)
        models.train(model, optimizer, 1)
        rw.resize(model, {sites(model)[1].name: plan["rank"]})
        with pytest.raises(RuntimeError, match="ranks have changed"):
            models.train(model, optimizer, 1)


def test_a_state_of_another_optimizer_or_of_other_ranks_is_refused():
    method, plain = made(projected=True), made()
    model, other = attached(method), attached(plain)
    with pytest.raises(RuntimeError, match="not written by ProjectedAdam"):
        stepper(method, model).load_state_dict(stepper(plain, other).state_dict())
    with pytest.raises(RuntimeError, match="not written by SimplexAdam"):
        stepper(plain, other).load_state_dict(stepper(method, model).state_dict())
    state = stepper(method, model).state_dict()
    rw.resize(model, {sites(model)[0].name: 1})
    with pytest.raises(RuntimeError, match="other ranks"):
        stepper(method, model).load_state_dict(state)


# --- resume ----------------------------------------------------------------------------------------------------------


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_shape
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_bare_loop_cut_anywhere_goes_on_bit_identically(cut, projected, shape, tmp_path):
    """Also in a process that draws another A: the checkpoint holds it, though it does not train."""
    method = made(projected=projected, dropout=0.1)

    def run(seed, resume=None):
        model = attached(method, shape, seed)
        optimizer = stepper(method, model, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        torch.manual_seed(5)
        losses = []
        for step in range(rw.load_checkpoint(resume, model, optimizer, schedule) if resume else 0, 5):
            losses += models.train(model, optimizer, 1, start=step)
            schedule.step()
            if step + 1 == cut and not resume:
                rw.save_checkpoint(tmp_path / "checkpoint", model, optimizer, schedule)
        return losses, model

    whole, model = run(1)
    rest, again = run(2, tmp_path / "checkpoint")
    assert rest == whole[cut:] and same_state(model, again)


def trained(kind, method, folder, seed, resume=None):
    model = attached(method, "gpt2", seed)
    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=1, seed=3,
        weight_decay=0.1, save_strategy="steps", save_steps=1, logging_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    given = {"model": model, "args": args, "train_dataset": models.rows(), "data_collator": default_data_collator}
    if kind == "rank":
        trainer = rw.RankTrainer(method=method, **given)
    else:
        optimizers = (method.optimizer(model, args), None)
        trainer = Trainer(**given, callbacks=[rw.RankCallback(method)], optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log], trainer


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["rank", "plain"])
def test_a_trainer_resumes_bit_identically(kind, projected, tmp_path):
    method = made(projected=projected, dropout=0.1)
    whole, before = trained(kind, method, tmp_path, 1)
    assert isinstance(before.optimizer.optimizer, ProjectedAdam) == projected
    for cut in (1, 4):
        checkpoint = str(tmp_path / f"checkpoint-{cut}")
        rest, after = trained(kind, method, tmp_path / f"again-{cut}", seed=2, resume=checkpoint)
        assert rest == whole and same_state(before.model, after.model)
        assert after.optimizer.optimizer.steps == 6


def test_a_plain_trainer_and_a_rank_trainer_do_the_same_when_projected(tmp_path):
    method = made(projected=True)
    (a, first), (b, second) = trained("rank", method, tmp_path / "a", 1), trained("plain", method, tmp_path / "b", 1)
    assert a == b and same_state(first.model, second.model)


def test_the_callback_still_refuses_an_optimizer_that_is_not_the_methods(tmp_path):
    method = made(projected=True)
    model = attached(method)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    for wrong in (torch.optim.AdamW(model.parameters()), create_lorafa_optimizer(model, 2, 4, 1e-3)):
        trainer = Trainer(
            model,
            args,
            train_dataset=models.rows(),
            callbacks=[rw.RankCallback(method)],
            data_collator=default_data_collator,
            optimizers=(wrong, None),
        )
        with pytest.raises(RuntimeError, match="needs its own optimizer"):
            trainer.train()


def test_a_checkpoint_without_A_is_refused(tmp_path):
    """As one of plain head training would be; the A at hand was drawn afresh and fits no B of the past."""
    method = made()
    model = attached(method)
    rw.save_checkpoint(tmp_path / "checkpoint", model, stepper(method, model))
    path = tmp_path / "checkpoint" / "checkpoint.pt"
    state = torch.load(path)
    state["model"] = {name: value for name, value in state["model"].items() if "lora_A" not in name}
    torch.save(state, path)
    with pytest.raises(rw.InputError, match="lora_A"):
        rw.load_checkpoint(tmp_path / "checkpoint", model, stepper(method, model))
