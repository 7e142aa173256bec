"""AdaLoRA by PEFT: it allocates, nothing of it is lost in a restart, and what is left at the end is plain LoRA."""

import copy
import json

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

import models
import rankwise as rw
import stock_peft
from methods import one_shape
from rankwise.adapters.stored import stored
from rankwise.methods import build
from rankwise.ranks import ranks
from rankwise.ranks.triplets import peft_config, triplets

every_shape = pytest.mark.parametrize("shape", models.SHAPES)
TOTAL = 12
OPTIONS = {"rank": 2, "init_rank": 4, "start": 2, "settle": 4, "every": 2, "total": TOTAL}


def made(**more):
    return build({"name": "adalora", **OPTIONS, **more})


def attached(method, shape="bert", seed=1):
    torch.manual_seed(seed)
    return method.attach(models.model(shape), head=models.head(shape))


def trained(method, shape="bert", steps=TOTAL):
    model = attached(method, shape)
    models.train(model, rw.SimplexAdam(method, model, lr=1e-2), steps)
    return model


def live(model):
    """How many E of each layer are not 0."""
    return {name: int(layer.lora_E["default"].count_nonzero()) for name, layer in triplets(model).items()}


# --- it allocates ----------------------------------------------------------------------------------------------------


@every_shape
def test_ranks_differ_after_training_and_sum_to_the_target(shape):
    found = live(trained(made(), shape))
    assert sum(found.values()) == 2 * len(found)
    assert len(set(found.values())) > 1
    folded = made().fold(trained(made(), shape))
    assert ranks(folded) == found


def test_the_number_of_units_falls_to_the_target_and_stays_there():
    method = made(every=1)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    n, sums = len(triplets(model)), []
    for step in range(TOTAL):
        models.train(model, optimizer, 1, start=step)
        assert peft_config(model).rank_pattern is None
        sums.append(sum(int(layer.lora_scores["default"].chosen.sum()) for layer in triplets(model).values()))
    cubic = [int(2 * n * (1 - (step - 2) / 6) ** 3 + 2 * n) for step in range(3, 9)]  # eq. 12
    assert sums == [4 * n, 4 * n, *cubic, *[2 * n] * 4]
    assert sum(live(model).values()) == 2 * n


@pytest.mark.parametrize("orthogonality", [0.0, 0.3])
def test_it_does_what_peft_driven_by_hand_does(orthogonality):
    """PEFT's own model for a task, whose loss has the orthogonality term, and its allocator called in the loop."""
    method = made(orthogonality=orthogonality)
    ours = trained(method)
    torch.manual_seed(1)
    config = AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=2, lora_alpha=16, tinit=2, tfinal=4, deltaT=2, total_step=TOTAL,
        beta1=0.85, beta2=0.85, orth_reg_weight=orthogonality, target_modules=list(triplets(ours)),
    )  # fmt: skip
    theirs = get_peft_model(models.model(), config).train()
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(TOTAL):
        theirs(**models.batch(seed=step)).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    found = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p, found[name], atol=1e-4), name
    assert live(ours) == {
        name: int(found[f"base_model.model.{name}.lora_E.default"].count_nonzero()) for name in triplets(ours)
    }


@every_shape
def test_the_gradient_of_the_orthogonality_term_is_that_of_autograd(shape):
    method = made(orthogonality=0.7)
    model = attached(method, shape)
    layers = triplets(model).values()
    for p in (p for layer in layers for p in (layer.lora_A["default"], layer.lora_B["default"])):
        nn.init.normal_(p)
    method.before_step(model)
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    model.zero_grad()
    both = [P for layer in layers for P in (layer.lora_A["default"], layer.lora_B["default"].T)]
    (0.7 * torch.stack([(P @ P.T - torch.eye(4)).norm() for P in both]).mean()).backward()
    now = dict(model.named_parameters())
    for name, grad in mine.items():
        assert torch.allclose(grad, torch.zeros(1) if now[name].grad is None else now[name].grad, atol=1e-6)


def test_attaching_changes_no_bit_and_the_head_trains():
    model = attached(made())
    assert made().exact_start and torch.equal(models.logits(model), models.logits(models.model()))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    assert {name.split(".lora_")[1] for name in trains if "lora_" in name} == {f"{part}.default" for part in "AEB"}


def test_a_layer_that_had_no_part_in_the_loss_hinders_nothing():
    method = made()
    model = method.attach(models.Half(6))
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    for _ in range(TOTAL):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks(method.fold(model)) == {"used": 4, "idle": 0}


# --- a restart loses nothing -----------------------------------------------------------------------------------------


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@one_shape
def test_a_bare_loop_cut_in_any_phase_goes_on_bit_identically(shape, tmp_path):
    method = made(dropout=0.1)

    def run(seed, resume=None):
        model = attached(method, shape, seed)
        optimizer = rw.SimplexAdam(method, model, lr=1e-2)
        torch.manual_seed(5)
        losses = []
        for step in range(rw.load_checkpoint(resume, model, optimizer) if resume else 0, TOTAL):
            losses += models.train(model, optimizer, 1, start=step)
            if not resume:
                rw.save_checkpoint(tmp_path / str(step + 1), model, optimizer)
        return losses, model

    whole, model = run(1)
    for cut in (1, 3, 4, 7, 8, 9):  # before the first choice, at one, between two, at the last and after it
        rest, again = run(2, tmp_path / str(cut))
        assert rest == whole[cut:] and same_state(model, again)


def in_a_trainer(kind, method, folder, seed=1, resume=None, **more):
    model = attached(method, "gpt2", seed)
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=1, seed=3, save_strategy="steps",
        save_steps=1, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **{"max_steps": TOTAL, **more},
    )  # fmt: skip
    given = {"model": model, "args": args, "train_dataset": models.rows(), "data_collator": default_data_collator}
    if kind == "rank":
        trainer = rw.RankTrainer(method=method, **given)
    else:
        optimizers = (method.optimizer(model, args), None)
        trainer = Trainer(**given, callbacks=[rw.RankCallback(method)], optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log], trainer.model


@pytest.mark.large
@pytest.mark.parametrize("kind", ["rank", "plain"])
def test_a_trainer_resumes_bit_identically_and_says_how_many_steps_there_are(kind, tmp_path):
    method = made(total=0, dropout=0.1)
    whole, model = in_a_trainer(kind, method, tmp_path)
    found = live(model)
    assert sum(found.values()) == 2 * len(found) and len(set(found.values())) > 1
    for cut in (1, 4, 7, 8, 10):
        checkpoint = str(tmp_path / f"checkpoint-{cut}")
        rest, again = in_a_trainer(kind, method, tmp_path / f"again-{cut}", seed=2, resume=checkpoint)
        assert rest == whole and same_state(model, again)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    _, model = in_a_trainer("rank", made(total=0), tmp_path, gradient_accumulation_steps=2)
    assert sum(live(model).values()) == 2 * len(live(model))


# --- folded to plain LoRA --------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("steps", [0, 1, 6, TOTAL])
def test_folding_gives_plain_lora_with_the_same_logits_and_leaves_the_model_alone(steps, shape):
    method = made()
    model = trained(method, shape, steps)
    before, state, stream = models.logits(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    folded = method.fold(model)
    assert isinstance(folded, PeftModel) and peft_config(folded).peft_type == "LORA"
    assert folded.training == model.training
    assert torch.allclose(models.logits(folded), before, atol=1e-5)
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(models.logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    for name, rank in live(model).items():
        assert ranks(folded)[name] == rank or not any(live(model).values())
    assert method.fold(folded) is folded


@every_shape
def test_the_base_is_shared_and_the_head_is_not(shape):
    model = trained(made(), shape)
    folded = made().fold(model)
    mine, theirs = dict(model.named_parameters()), dict(folded.named_parameters())
    head = [name for name in mine if "modules_to_save" in name]
    assert head and all(torch.equal(mine[n], theirs[n]) and mine[n] is not theirs[n] for n in head)
    assert all(theirs[n].requires_grad for n in head)
    base = [name for name in mine if "lora_" not in name and "modules_to_save" not in name and "ranknum" not in name]
    assert len(base) > 10 and all(mine[name] is theirs[name] for name in base)


def test_what_is_folded_trains_on_as_lora_and_the_other_is_not_touched():
    model = trained(made())
    state = copy.deepcopy(model.state_dict())
    folded = made().fold(model)
    before = models.logits(folded)
    method = rw.LoRA(rank=2)
    models.train(folded, rw.SimplexAdam(method, folded, lr=1e-2), 2)
    assert not torch.equal(models.logits(folded), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@one_shape
def test_stock_peft_without_rankwise_loads_what_was_folded(shape, tmp_path):
    model = trained(made(), shape)
    names = list(triplets(model))
    with torch.no_grad():  # every kind of site is made sure of
        triplets(model)[names[0]].lora_E["default"].zero_()
    folded = made().fold(model)
    assert ranks(folded)[names[0]] == 0
    rw.save(folded, tmp_path / "adapter")
    assert names[0] not in stored(tmp_path / "adapter").names
    stock_peft.agrees(models.model(shape), models.batch(), {tmp_path / "adapter": models.logits(model)}, tmp_path)


def test_on_parts_of_a_fused_projection_it_allocates_folds_and_is_saved(tmp_path):
    method = made(targets=["c_attn.q", "c_attn.v"])
    assert torch.equal(models.logits(attached(method, "gpt2")), models.logits(models.model("gpt2")))
    model = trained(method, "gpt2")
    assert sum(live(model).values()) == 2 * len(live(model)) == 8
    folded = method.fold(model)
    assert torch.allclose(models.logits(folded), models.logits(model), atol=1e-5)
    rw.save(folded, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models.model("gpt2"), str(tmp_path / "adapter")).eval()
    assert torch.allclose(models.logits(loaded), models.logits(model), atol=1e-5)


@every_shape
def test_saved_without_folding_it_loads_to_the_same_logits(shape, tmp_path):
    model = trained(made(), shape, 6)
    before = models.logits(model)
    rw.save(model, tmp_path / "adapter")
    assert torch.equal(models.logits(model), before)
    loaded = rw.load(models.model(shape), tmp_path / "adapter")
    assert peft_config(loaded).peft_type == "LORA"
    assert torch.allclose(models.logits(loaded), before, atol=1e-5)


def test_a_model_whose_units_are_all_0_keeps_one():
    model = attached(made())
    folded = made().fold(model)
    assert sorted(ranks(folded).values())[-2:] == [0, 1]
    assert torch.equal(models.logits(folded), models.logits(models.model()))


def test_a_folded_model_can_be_resized_and_resumed(tmp_path):
    model = made().fold(trained(made()))
    rw.resize(model, dict.fromkeys(ranks(model), 1))
    again = made().fold(trained(made()))
    again.load_state_dict(model.state_dict())
    assert ranks(again) == ranks(model) and torch.equal(models.logits(again), models.logits(model))


# --- counts, options -------------------------------------------------------------------------------------------------


@every_shape
def test_the_budget_is_what_uniform_ranks_cost_and_final_is_never_exceeded(shape):
    method = made()
    model = attached(method, shape)
    uniform = rw.LoRA(rank=2).attach(models.model(shape), head=models.head(shape))
    assert method.budget(model) == rw.rank_report(uniform).total
    final, least = method.final(model), method.budget(model)
    folded = method.fold(trained(method, shape))
    left = sum(p.numel() for p in folded.parameters() if p.requires_grad)
    assert left <= final and least <= final


def test_where_all_sites_cost_the_same_final_is_the_budget_and_the_head():
    method = made(targets=["query", "key", "value"])
    model = attached(method)
    head = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name)
    assert method.final(model) == method.budget(model) + head


def test_phases_below_1_are_shares_of_the_training(tmp_path):
    method = made(start=0.25, settle=0.5, total=0)
    model = attached(method)
    args = TrainingArguments(str(tmp_path), max_steps=40, report_to=[])
    method.optimizer(model, args)
    config = peft_config(model)
    assert (config.tinit, config.tfinal, config.total_step) == (10, 20, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"init_rank": 2}, r"init_rank must be above 2 \(rank\)"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"every": 0}, "every must be at least 1"),
        ({"total": -1}, "total must not be negative"),
        ({"start": -1}, "start must not be negative"),
        ({"beta1": 1.0}, "beta1 must be between 0 and 1"),
        ({"beta2": 0.0}, "beta2 must be between 0 and 1"),
        ({"orthogonality": -0.1}, "orthogonality must not be negative"),
        ({"start": 8, "settle": 4}, "leave none of 12 steps"),
        ({"start": 0.5, "settle": 0.5}, "leave none of 12 steps"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        made(**options)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_model_or_run_gets_one_clear_line(tmp_path):
    method = made(total=0)
    model = attached(method)
    epochs = TrainingArguments(str(tmp_path), num_train_epochs=3, report_to=[])
    short = TrainingArguments(str(tmp_path), max_steps=5, report_to=[])
    for act, message in (
        (lambda: made(init_rank=64).attach(models.model()), "init_rank 64 is too large"),
        (lambda: made().attach(attached(made())), "already has an adapter"),
        (lambda: made(targets=["querry"]).attach(models.model()), "query"),
        (lambda: made().attach(models.model(), head=["klassifier"]), "classifier"),
        (lambda: rw.SimplexAdam(method, model), "set total"),
        (lambda: method.optimizer(model, epochs), "max_steps"),
        (lambda: method.optimizer(model, short), "leave none of 5 steps"),
    ):
        with pytest.raises(rw.InputError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_on_the_meta_device_it_can_be_counted():
    with torch.device("meta"):
        model = made().attach(models.model("llama"), head=["score"])
    layers = triplets(model).values()
    expected = sum(4 * (layer.in_features + layer.out_features + 1) for layer in layers) + 16 * models.LABELS
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert made().final(model) is not None


def test_a_checkpoint_in_mid_search_is_not_cut_by_peft(tmp_path):
    """PEFT cuts what it saves to `rank_pattern`, and then cannot load it into the model as it was."""
    in_a_trainer("rank", made(total=0), tmp_path, max_steps=TOTAL)
    for step in (4, 8, TOTAL):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert json.loads((checkpoint / "adapter_config.json").read_text())["rank_pattern"] is None
        state = load_file(checkpoint / "adapter_model.safetensors")
        assert {value.shape[0] for key, value in state.items() if key.endswith(".lora_A")} == {4}


def test_the_term_of_each_step_walks_no_modules(monkeypatch):
    model = made().attach(models.model(), head=["classifier"])
    model(**models.batch()).loss.backward()

    def walk(*_, **__):
        raise AssertionError("a walk over all modules")

    before = {name: layer.lora_A["default"].grad.clone() for name, layer in triplets(model).items()}
    layers = triplets(model)
    monkeypatch.setattr(torch.nn.Module, "named_modules", walk)
    made().before_step(model)
    assert not any(torch.equal(layer.lora_A["default"].grad, before[name]) for name, layer in layers.items())
