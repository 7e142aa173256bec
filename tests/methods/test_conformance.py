"""What every registered method promises. A new method is tested here the moment its file exists."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainingArguments, default_data_collator

import rankwise as rw
import stock
import tiny
from every import TRAINS, attached, every_method, every_shape, method
from rankwise.ranks import ranks, sites

SEARCH_FREE = (
    "adapter-h", "adapter-l", "bitfit", "dora", "full", "full-top", "head", "lora", "lora-fa", "pissa", "pre-embed",
    "pre-layer", "random-lora",
)  # fmt: skip


def optimizer(name, model, lr=1e-2):
    return rw.SimplexAdam(method(name), model, lr=lr)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@every_method
@every_shape
def test_attaching_leaves_the_logits_bit_for_bit_unless_the_method_says_otherwise(name, shape):
    model, base = tiny.logits(attached(name, shape)), tiny.logits(tiny.model(shape))
    assert torch.equal(model, base) == method(name).exact_start
    assert model.shape == base.shape


@every_method
def test_what_trains_has_the_names_of_the_table_and_no_other(name):
    model = attached(name)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in names if re.search(r"(^|\.)classifier\.(modules_to_save\.default\.)?(weight|bias)$", n)}
    assert head
    assert {n for n in names if re.search(TRAINS[name], n)} | head == names
    # The other way round: everything that looks like it trains, but for what a wrapper keeps of the head.
    looks = {n for n, _ in model.named_parameters() if re.search(TRAINS[name], n) and "original_module" not in n}
    assert looks <= names


@every_method
@every_shape
def test_groups_are_disjoint_and_cover_all_that_trains(name, shape):
    model = attached(name, shape)
    grouped = [p for group in method(name).param_groups(model) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}


@every_method
@every_shape
def test_training_moves_what_trains_and_nothing_else(name, shape):
    model = attached(name, shape)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    losses = tiny.train(model, optimizer(name, model), 3)
    assert all(torch.isfinite(torch.tensor(losses)))
    now = dict(model.named_parameters())
    kept = [n for n in frozen if n in now]
    assert all(torch.equal(now[n], frozen[n]) for n in kept if "ranknum" not in n)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n in buffers and "lora_" not in n)
    same = [n for n in before if n in now and now[n].shape == before[n].shape and torch.equal(now[n], before[n])]
    assert len(same) < len(before) / 2, same  # some inputs leave some parameters without a gradient


@every_method
@every_shape
def test_folding_changes_no_output(name, shape):
    model = attached(name, shape)
    tiny.train(model, optimizer(name, model), 3)
    before = tiny.logits(model)
    folded = method(name).fold(model)
    assert torch.allclose(tiny.logits(folded), before, atol=1e-5)
    assert all(site.scale is None for site in sites(folded))
    assert torch.equal(tiny.logits(method(name).fold(folded)), tiny.logits(folded))


@every_method
@pytest.mark.parametrize("cut", range(1, 7))
def test_a_bare_loop_cut_at_any_step_goes_on_bit_identically(name, cut, tmp_path):
    def run(steps, resume=None, save=None):
        model = attached(name)
        stepper = optimizer(name, model)
        schedule = torch.optim.lr_scheduler.LinearLR(stepper, 1.0, 0.1, 8)
        torch.manual_seed(5)
        start = rw.load_checkpoint(resume, model, stepper, schedule) if resume else 0
        losses = []
        for step in range(start, steps):
            losses += tiny.train(model, stepper, 1, start=step)
            schedule.step()
            if save and step + 1 == cut:
                rw.save_checkpoint(save, model, stepper, schedule)
        return losses, model, stepper.search()

    whole, model, found = run(7, save=tmp_path / "checkpoint")
    rest, resumed, again = run(7, resume=tmp_path / "checkpoint")
    assert rest == whole[cut:] and again == found
    a, b = model.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(name, folder, resume=None):
    model = attached(name)
    args = TrainingArguments(
        str(folder), max_steps=7, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=1, seed=3,
        save_strategy="steps", save_steps=1, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = rw.RankTrainer(
        method=method(name), model=model, args=args, train_dataset=tiny.rows(), data_collator=default_data_collator
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return losses, model


@every_method
def test_trainer_resumes_bit_identically(name, tmp_path):
    whole, model = trained(name, tmp_path / "run")
    rest, resumed = trained(name, tmp_path / "again", resume=str(tmp_path / "run" / "checkpoint-3"))
    assert {step: rest[step] for step in range(4, 8)} == {step: whole[step] for step in range(4, 8)}
    a, b = model.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_method
@every_shape
def test_gradient_checkpointing_gives_the_same_losses(name, shape):
    plain, saving = attached(name, shape), attached(name, shape)
    tiny.recompute(saving, {"use_reentrant": False})
    torch.manual_seed(3)
    expected = tiny.train(plain, optimizer(name, plain), 5)
    torch.manual_seed(3)
    found = tiny.train(saving, optimizer(name, saving), 5)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)


@every_method
def test_bf16_autocast_trains(name):
    model = attached(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = tiny.train(model, optimizer(name, model), 5)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # while torch looks at PEFT's DoRA
@pytest.mark.parametrize("name", SEARCH_FREE)
def test_compiled_it_trains_to_the_same_losses(name):
    plain, compiled = without_dropout(attached(name)), without_dropout(attached(name))
    expected = tiny.train(plain, optimizer(name, plain), 3)
    torch._dynamo.reset()
    bare = torch.compile(tiny.model(), backend="aot_eager")  # what is compiled for it must not serve the others
    tiny.train(bare, torch.optim.SGD(bare.parameters(), lr=0.0), 1)
    fast = torch.compile(compiled, backend="aot_eager")
    found = tiny.train(fast, optimizer(name, compiled), 3)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)


@every_method
@every_shape
def test_saved_and_loaded_again_gives_the_same_logits(name, shape, tmp_path):
    model = attached(name, shape)
    tiny.train(model, optimizer(name, model), 3)
    before = tiny.logits(model)
    rw.save(model, tmp_path / "adapter", method(name), head=tiny.head(shape))
    assert torch.equal(tiny.logits(model), before)
    again = rw.load(tiny.model(shape), tmp_path / "adapter")
    assert torch.allclose(tiny.logits(again), before, atol=1e-5)


@every_shape
def test_stock_peft_loads_every_method_that_is_an_adapter(shape, tmp_path):
    expected = {}
    for name in TRAINS:
        model = attached(name, shape)
        tiny.train(model, optimizer(name, model), 3)
        expected[tmp_path / name] = tiny.logits(model)
        model = method(name).fold(model)
        if isinstance(model, PeftModel):
            rw.save(model, tmp_path / name)
        else:
            del expected[tmp_path / name]
    assert len(expected) >= 10
    stock.agrees(tiny.model(shape), tiny.batch(), expected, tmp_path)


@every_method
def test_what_is_left_at_the_end_is_no_more_than_the_method_says(name):
    model = attached(name)
    most = method(name).final(model)
    tiny.train(model, optimizer(name, model), 7)
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    folded = sum(p.numel() for p in method(name).fold(model).parameters() if p.requires_grad)
    assert folded <= left
    assert most is None or min(left, folded) <= most


def whole_state(model, stepper):
    """All that a rank change touches: every tensor and which Parameter it is, PEFT's records, the optimizer."""
    tensors = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    records = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    layers = [
        (dict(part.r), dict(part.lora_alpha), dict(part.scaling), [*part.lora_A], [*getattr(part, "lora_empty", ())])
        for part in model.modules()
        if isinstance(part, LoraLayer)
    ]
    return (tensors, records, layers), values, copy.deepcopy(stepper.state_dict())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@every_method
def test_a_plan_that_is_refused_leaves_the_model_as_it_was(name):
    """The method's own plans, at every step and at the end, with what cannot be carried out added to them."""
    model = attached(name)
    stepper = optimizer(name, model)
    for step in range(1, 6):
        model(**tiny.batch(seed=step)).loss.backward()
        before = whole_state(model, stepper)[0]
        own = method(name).after_step(model, step, 1e-2)
        assert whole_state(model, stepper)[0] == before, "after_step did what its plan should say"
        for plan in (own, method(name).last_plan(model)):
            if plan is None or not isinstance(model, PeftModel):
                continue
            here = {site.name: site for site in sites(model)}
            most = dict.fromkeys([*here][-1:], 1000)
            bad = [{**plan, "nowhere": 1}, {**plan, **most}, dict.fromkeys(here, 0)] if here else [{"nowhere": 1}]
            then = whole_state(model, stepper)
            for refused in bad:
                with pytest.raises(rw.InputError):
                    rw.resize(model, replace(plan, ranks=refused))
                assert equal(whole_state(model, stepper), then)
            if any(rank != here[site].rank for site, rank in plan.items()):
                model.merge_adapter()
                then = whole_state(model, stepper)
                with pytest.raises(rw.InputError, match="call unmerge_adapter"):
                    rw.resize(model, plan)
                assert equal(whole_state(model, stepper), then)
                model.unmerge_adapter()
        stepper.step()
        stepper.zero_grad()


@every_method
@pytest.mark.parametrize("steps", [1, 7])
def test_a_method_that_learns_ranks_says_at_how_many_sites_they_have_changed(name, steps):
    """Asked before the fold it says what the fold will leave."""
    model, learns = attached(name), method(name).check_every > 0
    stepper = optimizer(name, model)
    tiny.train(model, stepper, steps)
    found = stepper.search()
    left = ranks(method(name).fold(model))
    if not learns:
        assert found is None
        return
    begun = getattr(method(name), method(name).sizes[0])
    assert (found.changed, found.sites) == (sum(rank != begun for rank in left.values()), len(left))
    assert found.changed or (found.advice and "the result is that of plain LoRA" in str(found))
