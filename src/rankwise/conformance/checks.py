"""The promises of a method, each a function that raises AssertionError where it is not kept.

A function is called what it checks: its name is the line of the table that `rankwise check-method` prints.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator

from rankwise.adapters import load, save
from rankwise.conformance import models
from rankwise.errors import InputError
from rankwise.methods import Method
from rankwise.methods.peer import DRAWN_AGAIN
from rankwise.optim import SimplexAdam
from rankwise.ranks import ranks, resize, sites
from rankwise.train.bare_loop import load_checkpoint, save_checkpoint
from rankwise.train.trainer import RankTrainer

STEPS = 7
"""Steps of the longest training: searches for ranks have to fall within them to be checked."""


@dataclass(frozen=True)
class Case:
    """A method on a small model of one architecture, with a folder for what is written."""

    method: Method
    folder: Path
    shape: str = "bert"

    def attached(self) -> Any:
        """The method on a fresh model, the same one each time."""
        torch.manual_seed(1)
        return self.method.attach(models.model(self.shape), head=models.head(self.shape))

    def optimizer(self, model: nn.Module) -> SimplexAdam:
        return SimplexAdam(self.method, model, lr=1e-2)

    def trained(self, steps: int) -> Any:
        model = self.attached()
        models.train(model, self.optimizer(model), steps)
        return model


Check = Callable[[Case], None]
CHECKS: dict[Check, Sequence[str]] = {}
"""Check -> the architectures that it is run on."""


def _on(*shapes: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[check] = shapes
        return check

    return register


@_on(*models.SHAPES)
def attaching_changes_no_logit_unless_the_method_says_so(case: Case) -> None:
    found, base = models.logits(case.attached()), models.logits(models.model(case.shape))
    assert found.shape == base.shape, f"the logits have the shape {tuple(found.shape)}, not {tuple(base.shape)}"
    exact = torch.equal(found, base)
    assert exact == case.method.exact_start, f"exact_start is {case.method.exact_start}, and equal logits are {exact}"


@_on(*models.SHAPES)
def groups_are_disjoint_and_cover_all_that_trains(case: Case) -> None:
    model = case.attached()
    grouped = [p for group in case.method.param_groups(model) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}), "a parameter is in two groups, or twice in one"
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in grouped} == trained, "the groups do not hold exactly what trains"


@_on(*models.SHAPES)
def training_moves_what_trains_and_nothing_else(case: Case) -> None:
    model = case.attached()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    losses = models.train(model, case.optimizer(model), 3)
    assert torch.isfinite(torch.tensor(losses)).all(), f"the losses are {losses}"
    now = dict(model.named_parameters())
    moved = [n for n in frozen if n in now and "ranknum" not in n and not torch.equal(now[n], frozen[n])]
    assert not moved, f"{moved[0]} is frozen and has moved"
    kept = {n: b for n, b in model.named_buffers() if n in buffers and "lora_" not in n}
    moved = [n for n, b in kept.items() if not torch.equal(b, buffers[n])]
    assert not moved, f"the buffer {moved[0]} has changed"
    same = [n for n in before if n in now and now[n].shape == before[n].shape and torch.equal(now[n], before[n])]
    # some inputs leave some parameters without a gradient
    assert len(same) < len(before) / 2, f"{len(same)} of {len(before)} parameters that train have not moved: {same}"


@_on(*models.SHAPES)
def folding_changes_no_output(case: Case) -> None:
    model = case.trained(3)
    before = models.logits(model)
    folded = case.method.fold(model)
    assert torch.allclose(models.logits(folded), before, atol=1e-5), "the folded model gives other logits"
    assert all(site.scale is None for site in sites(folded)), "the folded model has scales"
    again = models.logits(case.method.fold(folded))
    assert torch.equal(again, models.logits(folded)), "to fold twice is not to fold once"


@_on("bert")
def a_bare_loop_cut_at_any_step_goes_on_bit_identically(case: Case) -> None:
    def run(resume: Path | None = None) -> tuple[list[float], nn.Module, object]:
        model = case.attached()
        stepper = case.optimizer(model)
        schedule = torch.optim.lr_scheduler.LinearLR(stepper, 1.0, 0.1, 8)
        torch.manual_seed(5)
        start = load_checkpoint(resume, model, stepper, schedule) if resume else 0
        losses = []
        for step in range(start, STEPS):
            losses += models.train(model, stepper, 1, start=step)
            schedule.step()
            if not resume and step + 1 < STEPS:
                save_checkpoint(case.folder / str(step + 1), model, stepper, schedule)
        return losses, model, stepper.search()

    whole, model, search = run()
    for cut in range(1, STEPS):
        rest, resumed, found = run(case.folder / str(cut))
        assert rest == whole[cut:], f"cut after step {cut} the losses are {rest}, not {whole[cut:]}"
        assert found == search, f"cut after step {cut} the search ends as {found}, not {search}"
        _same_state(resumed, model, f"cut after step {cut}")


@_on("bert")
def a_trainer_resumes_bit_identically(case: Case) -> None:
    def run(folder: Path, resume: Path | None = None) -> tuple[dict[Any, float], nn.Module]:
        model = case.attached()
        args = TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            warmup_steps=1,
            seed=3,
            save_strategy="steps",
            save_steps=1,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = RankTrainer(
            method=case.method,
            model=model,
            args=args,
            train_dataset=models.rows(),
            data_collator=default_data_collator,
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}, model

    whole, model = run(case.folder / "run")
    rest, resumed = run(case.folder / "again", case.folder / "run" / "checkpoint-3")
    late = {step: whole[step] for step in range(4, STEPS + 1)}
    assert {step: rest.get(step) for step in late} == late, f"the losses are {rest}, not {late}"
    _same_state(resumed, model, "resumed after step 3")


@_on(*models.SHAPES)
def gradient_checkpointing_gives_the_same_losses(case: Case) -> None:
    plain, saving = case.attached(), case.attached()
    models.recompute(saving, {"use_reentrant": False})
    torch.manual_seed(3)
    expected = models.train(plain, case.optimizer(plain), 5)
    torch.manual_seed(3)
    _close(models.train(saving, case.optimizer(saving), 5), expected)


@_on("bert")
def it_trains_under_bf16_autocast(case: Case) -> None:
    model = case.attached()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = models.train(model, case.optimizer(model), 5)
    assert torch.isfinite(torch.tensor(losses)).all(), f"the losses are {losses}"
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32}, f"the parameters are {kinds}"


@_on("bert")
def compiled_it_trains_to_the_same_losses(case: Case) -> None:
    """Where ranks are not learnt."""
    if case.method.check_every:
        return
    plain, compiled = _without_dropout(case.attached()), _without_dropout(case.attached())
    torch.manual_seed(3)
    expected = models.train(plain, case.optimizer(plain), 3)
    torch._dynamo.reset()
    bare: Any = torch.compile(models.model(), backend="aot_eager")  # what is compiled for it must not serve the others
    models.train(bare, torch.optim.SGD(bare.parameters(), lr=0.0), 1)
    fast: Any = torch.compile(compiled, backend="aot_eager")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)  # while torch looks at PEFT's DoRA
        _close(models.train(fast, case.optimizer(compiled), 3), expected)


@_on(*models.SHAPES)
def saved_and_loaded_again_it_gives_the_same_logits(case: Case) -> None:
    model = case.trained(3)
    before = models.logits(model)
    save(model, case.folder / "adapter", case.method, head=models.head(case.shape))
    assert torch.equal(models.logits(model), before), "saving has changed the model"
    again = load(models.model(case.shape), case.folder / "adapter")
    assert torch.allclose(models.logits(again), before, atol=1e-5), "the loaded model gives other logits"


@_on("bert")
def stock_peft_loads_what_is_saved(case: Case) -> None:
    """Of methods that are adapters."""
    model = case.trained(3)
    before = models.logits(model)
    model = case.method.fold(model)
    if isinstance(model, PeftModel):
        save(model, case.folder / "adapter")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", DRAWN_AGAIN)
            again = PeftModel.from_pretrained(models.model(), str(case.folder / "adapter"))
        assert torch.allclose(models.logits(again), before, atol=1e-5), "PEFT's model gives other logits"


@_on("bert")
def no_more_is_left_at_the_end_than_the_method_says(case: Case) -> None:
    model = case.attached()
    most = case.method.final(model)
    models.train(model, case.optimizer(model), STEPS)
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    folded = sum(p.numel() for p in case.method.fold(model).parameters() if p.requires_grad)
    assert folded <= left, f"the fold adds parameters: {folded} after it, {left} before"
    assert most is None or min(left, folded) <= most, f"final says {most} parameters, and {min(left, folded)} are left"


@_on("bert")
def a_search_says_at_how_many_sites_ranks_have_changed(case: Case) -> None:
    """Asked before the fold it says what the fold will leave."""
    for steps in (1, STEPS):
        model = case.attached()
        stepper = case.optimizer(model)
        models.train(model, stepper, steps)
        found = stepper.search()
        left = ranks(case.method.fold(model))
        if not case.method.check_every:
            assert found is None, f"the method learns no ranks, and says {found}"
            continue
        first = getattr(case.method, case.method.sizes[0])
        expected = sum(rank != first for rank in left.values()), len(left)
        assert found is not None and (found.changed, found.sites) == expected, f"{found} is said, true is {expected}"
        assert found.changed or (found.advice and "the result is that of plain LoRA" in str(found)), (
            "no advice is given"
        )


@_on("bert")
def a_plan_that_is_refused_leaves_the_model_as_it_was(case: Case) -> None:
    """The method's own plans, at every step and at the end, with what cannot be carried out added to them."""
    model = case.attached()
    stepper = case.optimizer(model)
    for step in range(1, 6):
        model(**models.batch(seed=step)).loss.backward()
        before = _structure(model)
        own = case.method.after_step(model, step, 1e-2)
        assert _structure(model) == before, "after_step did what its plan should say"
        for plan in (own, case.method.last_plan(model)):
            if plan is None or not isinstance(model, PeftModel):
                continue
            first = {site.name: site.rank for site in sites(model)}
            bad = [{**plan, "nowhere": 1}]
            if first:
                bad += [{**plan, [*first][-1]: 1000}, dict.fromkeys(first, 0)]
            for refused in bad:
                _refused(model, stepper, replace(plan, ranks=refused))
            if any(rank != first[site] > 0 for site, rank in plan.items()):
                model.merge_adapter()  # and then no present site can change its rank
                _refused(model, stepper, plan)
                model.unmerge_adapter()
        stepper.step()
        stepper.zero_grad()


def _refused(model: PeftModel, stepper: SimplexAdam, plan: Any) -> None:
    then = _values(model), _structure(model), copy.deepcopy(stepper.state_dict())
    try:
        resize(model, plan)
    except InputError:
        now = _values(model), _structure(model), stepper.state_dict()
        assert _equal(now, then), f"the plan {dict(plan)} is refused and has changed the model"
    else:
        raise AssertionError(f"the plan {dict(plan)} is not refused")


def _structure(model: Any) -> Any:
    """All of a model but the values: which Parameter is where, PEFT's configurations and what its layers record."""
    tensors = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    records = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    layers = [
        (dict(part.r), dict(part.lora_alpha), dict(part.scaling), [*part.lora_A], [*getattr(part, "lora_empty", ())])
        for part in model.modules()
        if isinstance(part, LoraLayer)
    ]
    return tensors, records, layers


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _same_state(model: nn.Module, other: nn.Module, when: str) -> None:
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys(), f"{when} the model has other tensors: {min(a.keys() ^ b.keys(), default='')}"
    assert not (strange := [key for key in a if not torch.equal(a[key], b[key])]), (
        f"{when} {strange[0]} is not the same"
    )


def _close(losses: Sequence[float], expected: Sequence[float]) -> None:
    close = torch.allclose(torch.tensor(losses), torch.tensor(expected), atol=1e-5)
    assert close, f"the losses are {losses}, not {expected}"


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
