"""RankTrainer, and a plain Trainer with RankCallback: trained whole, cut anywhere, resumed, best model loaded."""

import json
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import optuna
import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import default_compute_objective
from transformers.training_args import OptimizerNames

import models
import rankwise as rw
from methods import by_turns, one_shape
from rankwise.methods import build
from rankwise.ranks import ranks
from rankwise.ranks.kept import merged_sites
from rankwise.ranks.sites import omega

STEPS = 9  # in epochs of 3 steps
METHODS = {
    "lora": rw.LoRA(rank=2, dropout=0.1),
    "simplex": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=200.0, dropout=0.1),
    "restart": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=5e3, finish="restart", rewarm=2, moments="keep"),
    "merge": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=5e3, empty="merge"),  # a rate that empties sites
    "reinit": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=200.0, change="reinit", rounding="floor"),
}


def arguments(folder, save=True, reporting=(), **more):
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "seed": 3,
        "save_strategy": "steps" if save else "no",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": list(reporting),
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**given, **more})


class Stop(TrainerCallback):
    """Ends the training after a step, as a cut would."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.after
        return control


def trained(kind, method, folder, resume=None, shape="bert", stop=None, **more):
    torch.manual_seed(1)
    model = method.attach(models.model(shape), head=models.head(shape))
    args = arguments(folder, **more)
    given = {
        "model": model,
        "args": args,
        "train_dataset": models.rows(),
        "eval_dataset": models.rows(8, seed=9),
        "data_collator": default_data_collator,
        "callbacks": [Stop(stop)] if stop else [],
    }
    if kind == "rank":
        trainer = rw.RankTrainer(method=method, **given)
    else:
        given["callbacks"].append(rw.RankCallback(method))
        trainer = Trainer(**given, optimizers=(method.optimizer(model, args), None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.large
@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_at_any_step_and_resumed_is_bit_identical(name, tmp_path):
    method = METHODS[name]
    whole = trained("rank", method, tmp_path, train_sampling_strategy="group_by_length")
    assert name == "lora" or len(set(ranks(whole.model).values())) > 1
    assert bool(merged_sites(whole.model)) == (name == "merge")
    for cut in range(1, STEPS):
        again = trained(
            "rank",
            method,
            tmp_path / "again",
            resume=str(tmp_path / f"checkpoint-{cut}"),
            save=cut in (1, 5),  # one within the search and one after it
            train_sampling_strategy="group_by_length",
        )
        assert losses(again) == losses(whole)
        assert ranks(again.model) == ranks(whole.model)
        assert same_weights(again.model, whole.model)


@pytest.mark.parametrize("cut", [3, *(pytest.param(step, marks=pytest.mark.large) for step in (1, 2, 4, 6))])
def test_a_plain_trainer_resumes_bit_identically_too(cut, tmp_path):
    method = METHODS["simplex"]
    whole = trained("plain", method, tmp_path)
    again = trained("plain", method, tmp_path / "again", resume=str(tmp_path / f"checkpoint-{cut}"))
    assert losses(again) == losses(whole)
    assert ranks(again.model) == ranks(whole.model)
    assert same_weights(again.model, whole.model)


def test_a_plain_trainer_and_a_rank_trainer_do_the_same(tmp_path):
    a = trained("rank", METHODS["simplex"], tmp_path / "a")
    b = trained("plain", METHODS["simplex"], tmp_path / "b")
    assert losses(a) == losses(b) and same_weights(a.model, b.model)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    trainer = trained("rank", METHODS["simplex"], tmp_path, gradient_accumulation_steps=3)
    assert trainer.optimizer.optimizer.steps == STEPS
    assert omega(trainer.model) is None


def best_at(step, monkeypatch):
    """Let every evaluation find the model best at `step`."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_score": float(self.state.global_step == step)}
        self.log(dict(metrics))
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_the_best_model_is_loaded_from_before_a_merge(tmp_path, monkeypatch):
    best_at(1, monkeypatch)
    trainer = trained(
        "rank",
        METHODS["merge"],
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        eval_strategy="steps",
        eval_steps=1,
    )
    then = trained("rank", METHODS["merge"], tmp_path / "then", stop=1)
    assert merged_sites(trained("rank", METHODS["merge"], tmp_path / "whole").model) and not merged_sites(trainer.model)
    assert ranks(trainer.model) == ranks(then.model)
    assert torch.allclose(models.logits(trainer.model), models.logits(then.model), atol=1e-5)


@pytest.mark.parametrize("kind", ["rank", "plain"])
@pytest.mark.parametrize("best", [1, *(pytest.param(step, marks=pytest.mark.large) for step in (3, 6))])
def test_the_best_model_is_loaded_across_rank_changes(kind, best, tmp_path, monkeypatch):
    """Best is where the evaluation is told so; the model must then be the one of that checkpoint, ω included."""
    method = METHODS["simplex"]
    best_at(best, monkeypatch)
    trainer = trained(
        kind,
        method,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        eval_strategy="steps",
        eval_steps=1,
    )
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    then = trained(kind, method, tmp_path / "then", stop=best)
    assert ranks(trainer.model) == ranks(then.model)
    assert torch.equal(models.logits(trainer.model), models.logits(then.model))
    rw.save(trainer.model, tmp_path / "adapter")
    assert torch.allclose(
        models.logits(rw.load(models.model(), tmp_path / "adapter")), models.logits(then.model), atol=1e-5
    )


@one_shape
def test_trains_searches_and_saves_on_every_architecture(shape, tmp_path):
    trainer = trained("rank", METHODS["simplex"], tmp_path, shape=shape)
    assert omega(trainer.model) is None
    first, last = losses(trainer)[0][1], losses(trainer)[-1][1]
    assert last < first
    rw.save(trainer.model, tmp_path / "adapter")
    again = rw.load(models.model(shape), tmp_path / "adapter")
    assert torch.allclose(models.logits(again), models.logits(trainer.model), atol=1e-5)


class Larger(torch.nn.Module):
    """A model of which the adapted one is a part, as in sentence-transformers."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, **batch):
        return self.part(**batch)


def test_the_callback_works_where_the_adapted_model_is_a_part_of_the_trainers(tmp_path):
    def history(wrap, folder):
        torch.manual_seed(1)
        method = METHODS["simplex"]
        part = method.attach(models.model("bert"), head=models.head("bert"))
        args = arguments(folder, save=False, reporting=["tensorboard"], remove_unused_columns=False)
        trainer = Trainer(
            wrap(part), args, train_dataset=models.rows(), data_collator=default_data_collator,
            callbacks=[rw.RankCallback(method)], optimizers=(method.optimizer(part, args), None),
        )  # fmt: skip
        trainer.train()
        assert len(set(ranks(part).values())) > 1
        return [
            {key: row.get(key) for key in ("loss", "adapter_parameters", "empty_sites")}
            for row in trainer.state.log_history
        ]

    assert history(Larger, tmp_path / "part") == history(lambda part: part, tmp_path / "whole")


def test_the_wrong_optimizer_is_refused(tmp_path):
    method = METHODS["simplex"]
    model = method.attach(models.model(), head=models.head())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=models.rows(), callbacks=[rw.RankCallback(method)])
    with pytest.raises(RuntimeError, match="needs its own optimizer"):
        trainer.train()


def test_a_checkpoint_without_its_weights_or_optimizer_is_refused(tmp_path):
    method = METHODS["simplex"]
    trained("rank", method, tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(RuntimeError, match="the optimizer is at step 0"):
        trained("rank", method, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"))


def test_the_schedule_restarts_with_the_factors(tmp_path):
    trainer = trained("rank", METHODS["restart"], tmp_path)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    restart = METHODS["restart"].restart_step
    assert rates[restart] < rates[restart - 1] and max(rates[restart:]) == pytest.approx(1e-2)


def test_logs_tell_the_adapters_parameters(tmp_path):
    trainer = trained("rank", METHODS["simplex"], tmp_path)
    logged = [row["adapter_parameters"] for row in trainer.state.log_history if "loss" in row]
    assert logged[0] >= logged[-1] == rw.rank_report(trainer.model).total


def test_checkpoints_of_a_search_are_loud_in_stock_peft(tmp_path):
    """A checkpoint in mid-search holds ω beside the factors; its keys do not look like a finished adapter's."""
    trained("rank", METHODS["simplex"], tmp_path, stop=1)
    from safetensors import safe_open

    path = next(Path(tmp_path).glob("checkpoint-1/adapter_model.safetensors"))
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    assert any("lora_omega" in key for key in keys) and not any(key.endswith("lora_A.weight") for key in keys)
    assert json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_user_of_rank_trainer_gets_a_finished_adapter_at_any_step(tmp_path):
    """Next to its checkpoints too, which stay as they are."""
    for stop in (1, 3, STEPS):
        trainer = trained("rank", METHODS["simplex"], tmp_path / str(stop), stop=stop)
        for folder in (None, str(tmp_path / str(stop) / "elsewhere")):
            trainer.save_model(folder)
            made = Path(folder or trainer.args.output_dir)
            again = PeftModel.from_pretrained(models.model(), made).eval()
            assert torch.allclose(models.logits(again), models.logits(trainer.model), atol=1e-5)
            assert (made / "training_args.bin").is_file() and not list(made.glob(".*"))
    for step in range(1, 4):
        with pytest.raises(ValueError, match="not a finished adapter"):
            PeftModel.from_pretrained(models.model(), tmp_path / str(STEPS) / f"checkpoint-{step}")
    again = PeftModel.from_pretrained(models.model(), tmp_path / str(STEPS) / f"checkpoint-{STEPS}").eval()
    assert torch.allclose(models.logits(again), models.logits(trainer.model), atol=1e-5)


def test_the_best_model_of_a_search_is_saved_as_a_finished_adapter(tmp_path, monkeypatch):
    best_at(1, monkeypatch)
    more = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 1}
    trainer = trained("rank", METHODS["simplex"], tmp_path, **more)
    assert omega(trainer.model) is not None
    trainer.save_model()
    again = PeftModel.from_pretrained(models.model(), tmp_path).eval()
    assert torch.allclose(models.logits(again), models.logits(trainer.model), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (METHODS["merge"], "merged into the base weights"),
        (build({"name": "adapter-h", "size": 2}), "cannot load what adapter-h has added"),
        (build({"name": "pre-embed", "prefix": 2}), "cannot load what pre-embed has added"),
    ],
)
def test_a_model_that_its_file_alone_would_not_give_is_not_saved(method, message, tmp_path):
    trainer = trained("rank", method, tmp_path)
    with pytest.raises(rw.InputError, match=message):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_second_training_of_one_trainer_is_refused_and_of_a_new_one_goes_on(tmp_path):
    trainer = trained("rank", METHODS["simplex"], tmp_path)
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        trainer.train()
    again = rw.RankTrainer(
        method=METHODS["simplex"],
        model=trainer.model,
        args=arguments(tmp_path / "again"),
        train_dataset=models.rows(),
        data_collator=default_data_collator,
    )
    again.train()
    assert again.state.global_step == STEPS


def test_steps_that_a_gradient_scaler_skipped_do_not_hinder_a_resume(tmp_path):
    """The Trainer counts them, the optimizer does not."""
    method = METHODS["simplex"]
    model = method.attach(models.model(), head=models.head())
    optimizer = rw.SimplexAdam(method, model)
    optimizer.steps = 3
    state = TrainerState(global_step=5)
    rw.RankCallback(method).on_train_begin(arguments(tmp_path), state, TrainerControl(), optimizer=optimizer)


class Gradients(TrainerCallback):
    """Keeps those of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = [p.grad.clone() for p in model.parameters() if p.grad is not None]


def accumulated(folder, size, pieces, kind=rw.RankTrainer, **more):
    """A Trainer of one step on eight rows, and what keeps its gradients."""
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=pieces,
        seed=3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )
    kept = Gradients()
    given = {"args": args, "train_dataset": models.rows(8), "data_collator": default_data_collator, **more}
    given["callbacks"] = [kept, *given.get("callbacks", [])]
    return kind(**given), kept


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def agree(found):
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(whole, summed, atol=1e-6, rtol=1e-4)


@by_turns("method", [rw.LoRA(rank=2), rw.SimplexLoRA(rank=2, every=50)], ["bert", "llama"])
def test_accumulated_gradients_are_those_of_the_whole_batch(method, shape, tmp_path):
    found = []
    for size, pieces in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        model = method.attach(without_dropout(models.model(shape)), head=models.head(shape))
        trainer, kept = accumulated(tmp_path, size, pieces, model=model, method=method)
        trainer.train()
        found.append(kept.found)
    agree(found)


@pytest.mark.filterwarnings("ignore:.* are in no layer that can be adapted")  # XLNet's attention
@pytest.mark.parametrize(
    ("name", "scales", "told"),
    [
        pytest.param(name, scales, told, marks=[pytest.mark.large] * (told in heavy))
        for name, scales, heavy in (
            ("XLNetLMHeadModel", False, {"smooth", "function"}),
            ("LlamaForCausalLM", True, {"function of the batch alone"}),
        )
        for told in ("nothing", "smooth", "function", "function of the batch alone")
    ],
)
def test_whoever_computes_the_loss_is_asked_whether_it_scales(name, scales, told, tmp_path):
    """The model, the Trainer's label smoother, or a function of the user's, whatever its class is called."""
    found, batch = [], models.class_batch(name)

    def function(outputs, labels, num_items_in_batch):
        loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss / (num_items_in_batch if told == "function" else labels.numel())

    for size, pieces in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        method = rw.LoRA(rank=2)
        model = method.attach(without_dropout(models.of_class(name)))
        rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
        more = {"compute_loss_func": function} if told.startswith("function") else {}
        trainer, kept = accumulated(tmp_path, size, pieces, model=model, method=method, train_dataset=rows, **more)
        if told == "smooth":
            trainer.label_smoother = LabelSmoother(0.1)
        trainer.train()
        assert told != "nothing" or trainer.model_accepts_loss_kwargs == scales
        found.append(kept.found)
    agree(found)


@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_a_plain_trainer_whose_gradients_grow_with_accumulation_warns(shape, tmp_path):
    method = rw.LoRA(rank=2)
    found = []
    for size, pieces in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        model = method.attach(without_dropout(models.model(shape)), head=models.head(shape))
        callbacks = [rw.RankCallback(method)]
        args = arguments(tmp_path)
        optimizers = (method.optimizer(model, args), None)
        trainer, kept = accumulated(
            tmp_path, size, pieces, Trainer, model=model, callbacks=callbacks, optimizers=optimizers
        )
        with pytest.warns(UserWarning, match="use rankwise.RankTrainer") if pieces > 1 else nullcontext():
            trainer.train()
        found.append(kept.found)
    agree([[4 * grad for grad in found[0]], found[1]])


def test_a_plain_trainer_whose_loss_is_scaled_does_not_warn(tmp_path):
    method = rw.LoRA(rank=2)
    model = method.attach(models.of_class("LlamaForCausalLM"))
    batch = models.class_batch("LlamaForCausalLM")
    rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    optimizers = (method.optimizer(model, arguments(tmp_path)), None)
    trainer, _ = accumulated(
        tmp_path, 2, 4, Trainer, model=model, train_dataset=rows, callbacks=[rw.RankCallback(method)],
        optimizers=optimizers,
    )  # fmt: skip
    trainer.train()


# --- what TrainingArguments ask for ----------------------------------------------------------------------------------


class Read:
    """Arguments that remember which of them were looked at."""

    def __init__(self, args):
        self.args, self.seen = args, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self.args, name)


def test_every_argument_of_the_optimizer_and_the_schedule_is_read(tmp_path):
    known = {field.name for field in fields(TrainingArguments)}
    seen = []
    for restart in ("continue", "restart"):
        method = rw.SimplexLoRA(rank=2, every=2, times=2, finish=restart)
        for kind, more in ((Trainer, {}), (rw.RankTrainer, {"method": method})):
            model = method.attach(models.model(), head=models.head())
            trainer = kind(model=model, args=arguments(tmp_path, lr_scheduler_type="cosine_with_restarts"), **more)
            trainer.args = read = Read(trainer.args)
            trainer.create_optimizer_and_scheduler(10)
            seen.append(read.seen & known)
    assert seen[0] <= seen[1] and seen[2] <= seen[3]
    assert {"optim", "optim_args", "adam_beta2", "weight_decay", "lr_scheduler_kwargs"} <= seen[0]


@pytest.mark.parametrize("optim", OptimizerNames)
def test_an_optimizer_that_would_not_be_used_is_refused(optim, tmp_path):
    model = METHODS["lora"].attach(models.model(), head=models.head())
    args = arguments(tmp_path, optim=optim)
    if optim in ("adamw_torch", "adamw_torch_fused"):
        METHODS["lora"].optimizer(model, args)
        return
    for make in (rw.LoRA(rank=2), rw.LoRAFA(rank=2, projected=True)):
        with pytest.raises(rw.InputError, match=f"optim={optim.value} would be ignored"):
            make.optimizer(model, args)
    with pytest.raises(rw.InputError, match=f"optim={optim.value} would be ignored"):
        rw.RankTrainer(method=METHODS["lora"], model=model, args=args)


@pytest.mark.parametrize("options", [{"optim_args": "momentum=0.9"}, {"optim_target_modules": ["query"]}])
def test_options_of_another_optimizer_are_refused(options, tmp_path):
    model = METHODS["lora"].attach(models.model(), head=models.head())
    with pytest.raises(rw.InputError, match=f"{next(iter(options))}=.* would be ignored"):
        rw.RankTrainer(method=METHODS["lora"], model=model, args=arguments(tmp_path, **options))
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}
    with pytest.raises(rw.InputError, match="optimizer_cls_and_kwargs would be ignored"):
        rw.RankTrainer(method=METHODS["lora"], model=model, args=arguments(tmp_path), **given)


def test_a_schedule_that_restarts_keeps_its_options(tmp_path):
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 4e-3}}
    trainer = trained("rank", METHODS["restart"], tmp_path, **options)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert 4e-3 <= rates[-1] < 6e-3
    with pytest.raises(rw.InputError, match="cannot restart the schedule reduce_lr_on_plateau"):
        trained("rank", METHODS["restart"], tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")


# --- what is reported about ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank", "plain"])
def test_tensorboard_gets_every_rank_at_the_start_and_at_each_change(kind, tmp_path):
    trainer = trained(kind, METHODS["simplex"], tmp_path, reporting=["tensorboard"])
    [folder] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    told = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    final = ranks(trainer.model)
    assert {tag for tag in told if "ranks/" in tag} == {f"train/ranks/{name}" for name in ("total", "empty", *final)}
    assert told["train/ranks/total"][0] == (0, 2.0 * len(final))
    assert told["train/ranks/total"][-1][1] == sum(final.values())
    assert {step for step, _ in told["train/ranks/total"]} <= {0, 2, 4}
    assert {name: told[f"train/ranks/{name}"][-1][1] for name in final} == final
    assert len(told["train/loss"]) == STEPS


@pytest.mark.parametrize("kind", ["rank", "plain"])
def test_what_evaluate_returns_is_what_the_trainer_measured(kind, tmp_path):
    trainer = trained(kind, METHODS["simplex"], tmp_path)
    assert {key for key in trainer.evaluate() if not key.startswith("eval_")} <= {"epoch"}
    assert trainer.state.log_history[-1]["adapter_parameters"] == rw.rank_report(trainer.model).total


@pytest.mark.large
def test_a_hyperparameter_search_maximises_what_was_measured(tmp_path):
    method = METHODS["simplex"]

    def made():
        torch.manual_seed(1)
        return method.attach(models.model(), head=models.head())

    trainer = rw.RankTrainer(
        method=method,
        model_init=made,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=STEPS, save=False),
        train_dataset=models.rows(),
        eval_dataset=models.rows(8, seed=9),
        data_collator=default_data_collator,
    )
    optuna.logging.disable_default_handler()
    measured = []

    def objective(metrics):
        measured.append(dict(metrics)["eval_loss"])
        return default_compute_objective(metrics)

    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
        compute_objective=objective,
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert len(set(measured)) == 2 and best.objective == min(measured)


@pytest.mark.parametrize("kind", ["rank", pytest.param("plain", marks=pytest.mark.large)])
def test_the_end_of_a_search_is_told_once_and_as_a_warning_where_nothing_has_changed(kind, tmp_path, caplog):
    caplog.set_level("INFO", "rankwise")
    still = rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=0.0)
    alike = replace(still, targets=["query", "value"])  # sites of equal cost
    said = [
        (METHODS["simplex"], ("INFO", "simplex-lora: ranks changed at ")),
        (still, ("WARNING", "plain LoRA; raise omega_rate or every")),
        (
            alike,
            (
                "WARNING",
                "plain LoRA; a rank changes only where ω moves by half a rank or more: raise omega_rate or every",
            ),
        ),
        (rw.SimplexLoRA(rank=2, every=50), ("WARNING", "first change is due after step 50")),
        (replace(still, times=50), ("WARNING", "last change is due after step 100: train longer")),
        (rw.WeightLoRA(rank=2, keep=3, start=2, every=4), ("INFO", "weight-lora: ranks changed at 10 of 13 sites")),
        (rw.SoRA(rank=2), ("WARNING", "no gate has closed: raise sparsity")),
        (rw.LoRA(rank=2), None),
    ]
    for method, expected in said:
        caplog.clear()
        trained(kind, method, tmp_path)
        found = [(record.levelname, record.message) for record in caplog.records if record.name.startswith("rankwise")]
        assert len(found) == (expected is not None), found
        for level, text in found:
            assert level == expected[0] and expected[1] in text
