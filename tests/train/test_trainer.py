"""RankTrainer, and a plain Trainer with RankCallback: trained whole, cut anywhere, resumed, best model loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import rankwise as rw
import tiny
from rankwise.ranks import ranks
from rankwise.ranks.resize import merged
from rankwise.ranks.sites import omega

STEPS = 9  # in epochs of 3 steps
METHODS = {
    "lora": rw.LoRA(rank=2, dropout=0.1),
    "simplex": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=200.0, dropout=0.1),
    "restart": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=5e3, finish="restart", rewarm=2, moments="keep"),
    "merge": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=5e3, empty="merge"),  # a rate that empties sites
    "reinit": rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=200.0, change="reinit", rounding="floor"),
}


def arguments(folder, **more):
    return TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=2,
        seed=3,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )


class Stop(TrainerCallback):
    """Ends the training after a step, as a cut would."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.after
        return control


def trained(kind, method, folder, resume=None, shape="bert", stop=None, **more):
    torch.manual_seed(1)
    model = method.attach(tiny.model(shape), head=tiny.head(shape))
    args = arguments(folder, **more)
    given = {
        "model": model,
        "args": args,
        "train_dataset": tiny.rows(),
        "eval_dataset": tiny.rows(8, seed=9),
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


@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_at_any_step_and_resumed_is_bit_identical(name, tmp_path):
    method = METHODS[name]
    whole = trained("rank", method, tmp_path, train_sampling_strategy="group_by_length")
    assert name == "lora" or len(set(ranks(whole.model).values())) > 1
    assert bool(merged(whole.model)) == (name == "merge")
    for cut in range(1, STEPS):
        again = trained(
            "rank",
            method,
            tmp_path / "again",
            resume=str(tmp_path / f"checkpoint-{cut}"),
            train_sampling_strategy="group_by_length",
        )
        assert losses(again) == losses(whole)
        assert ranks(again.model) == ranks(whole.model)
        assert same_weights(again.model, whole.model)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 6])
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
    assert merged(trained("rank", METHODS["merge"], tmp_path / "whole").model) and not merged(trainer.model)
    assert ranks(trainer.model) == ranks(then.model)
    assert torch.allclose(tiny.logits(trainer.model), tiny.logits(then.model), atol=1e-5)


@pytest.mark.parametrize("kind", ["rank", "plain"])
@pytest.mark.parametrize("best", [1, 3, 6])
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
    assert torch.equal(tiny.logits(trainer.model), tiny.logits(then.model))
    rw.save(trainer.model, tmp_path / "adapter")
    assert torch.allclose(tiny.logits(rw.load(tiny.model(), tmp_path / "adapter")), tiny.logits(then.model), atol=1e-5)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_trains_searches_and_saves_on_every_architecture(shape, tmp_path):
    trainer = trained("rank", METHODS["simplex"], tmp_path, shape=shape)
    assert omega(trainer.model) is None
    first, last = losses(trainer)[0][1], losses(trainer)[-1][1]
    assert last < first
    rw.save(trainer.model, tmp_path / "adapter")
    again = rw.load(tiny.model(shape), tmp_path / "adapter")
    assert torch.allclose(tiny.logits(again), tiny.logits(trainer.model), atol=1e-5)


def test_the_wrong_optimizer_is_refused(tmp_path):
    method = METHODS["simplex"]
    model = method.attach(tiny.model(), head=tiny.head())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=tiny.rows(), callbacks=[rw.RankCallback(method)])
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


def test_a_second_training_of_one_trainer_is_refused_and_of_a_new_one_goes_on(tmp_path):
    trainer = trained("rank", METHODS["simplex"], tmp_path)
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        trainer.train()
    again = rw.RankTrainer(
        method=METHODS["simplex"],
        model=trainer.model,
        args=arguments(tmp_path / "again"),
        train_dataset=tiny.rows(),
        data_collator=default_data_collator,
    )
    again.train()
    assert again.state.global_step == STEPS


def test_steps_that_a_gradient_scaler_skipped_do_not_hinder_a_resume(tmp_path):
    """The Trainer counts them, the optimizer does not."""
    method = METHODS["simplex"]
    model = method.attach(tiny.model(), head=tiny.head())
    optimizer = rw.SimplexAdam(method, model)
    optimizer.steps = 3
    state = TrainerState(global_step=5)
    rw.RankCallback(method).on_train_begin(arguments(tmp_path), state, TrainerControl(), optimizer=optimizer)


@pytest.mark.parametrize("shape", ["bert", "llama"])
@pytest.mark.parametrize("method", [rw.LoRA(rank=2), rw.SimplexLoRA(rank=2, every=50)])
def test_accumulated_gradients_are_those_of_the_whole_batch(method, shape, tmp_path):
    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.found = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    found = []
    for size, pieces in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        base = tiny.model(shape)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        norm = Norm()
        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
            seed=3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            max_grad_norm=0.0,
        )
        rw.RankTrainer(
            method=method,
            model=method.attach(base, head=tiny.head(shape)),
            args=args,
            train_dataset=tiny.rows(8),
            data_collator=default_data_collator,
            callbacks=[norm],
        ).train()
        found.append(norm.found)
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(whole, summed, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rank", "plain"])
def test_the_end_of_a_search_is_told_once_and_as_a_warning_where_nothing_has_changed(kind, tmp_path, caplog):
    caplog.set_level("INFO", "rankwise")
    still = rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=0.0)
    alike = replace(still, targets=["query", "value"])  # sites of equal cost
    said = [
        (METHODS["simplex"], ("INFO", "simplex-lora: ranks changed at ")),
        (still, ("WARNING", "plain LoRA's; raise omega_rate or every")),
        (alike, ("WARNING", "plain LoRA's; no rank can change below 0.5: raise omega_rate or every")),
        (rw.SimplexLoRA(rank=2, every=50), ("WARNING", "first change is due after step 50")),
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
