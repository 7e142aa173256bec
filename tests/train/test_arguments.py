"""The settings that say how a run computes: what they change, what they leave as it is, and what is refused."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainingArguments

import runs
from asserts import refused
from launched import assert_equal
from rankwise import methods, tasks
from rankwise.results.rows import summarise
from rankwise.runs.store import Store
from rankwise.settings import RunConfig, Schema, load
from rankwise.sweep.check import Checked
from rankwise.train import arguments
from rankwise.train.checkpoint_files import last_complete
from rankwise.train.model import build, quiet
from rankwise.train.run import run
from rankwise.train.trainer import RunTrainer
from runs import SIMPLEX, lines, make

SORA = {"name": "sora", "rank": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without dropout, whose masks depend on how many rows there are at once."""
    return runs.bert(tmp_path_factory.mktemp("base") / "bert", dropout=0.0)


@pytest.fixture(scope="module")
def plain(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("runs") / "plain", model=base, method=SIMPLEX)
    run(folder)
    return folder


def trained(folder: Path, **settings: Any) -> Path:
    run(make(folder, **settings))
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 4},
        {"gradient_checkpointing": True},
        *(
            pytest.param(settings, marks=pytest.mark.large)
            for settings in (
                {"attention": "eager"},
                {"micro_batch": 100},
                {"attention": "sdpa"},
                {"trainer": {"adam_beta2": 0.999}},  # as by default
            )
        ),
    ],
    ids=str,
)
def test_what_changes_only_the_cost_changes_no_result(
    settings: dict[str, Any], base: str, plain: Path, tmp_path: Path
) -> None:
    folder = trained(tmp_path / "run", model=base, method=SIMPLEX, **settings)
    assert_equal(folder, plain)
    cost = json.loads((folder / "result.json").read_text())["cost"]
    assert cost.get("micro_batch", 16) == min(settings.get("micro_batch", 16), 16)
    [row] = summarise(Store(folder.parent).results([folder]))
    assert "out of memory" not in " ".join(row.remarks)


def test_fewer_activations_are_kept(monkeypatch: pytest.MonkeyPatch, base: str, tmp_path: Path) -> None:
    """The blocks run again in the backward pass."""
    from transformers.models.bert.modeling_bert import BertIntermediate

    calls: dict[bool, int] = {}
    forward = BertIntermediate.forward
    for on in (False, True):

        def counted(*args: Any, **more: Any) -> Any:
            calls[on] = calls.get(on, 0) + torch.is_grad_enabled()  # noqa: B023
            return forward(*args, **more)

        monkeypatch.setattr(BertIntermediate, "forward", counted)
        trained(tmp_path / str(on), model=base, gradient_checkpointing=on, max_steps=2)
    assert calls[True] == 2 * calls[False]


@pytest.mark.large
@pytest.mark.parametrize(
    "method",
    [
        SIMPLEX,
        *(
            pytest.param(each, marks=pytest.mark.large)
            for each in (SORA, {"name": "bitfit"}, {"name": "adapter-h"}, {"name": "pre-layer"})
        ),
    ],
    ids=str,
)
def test_bf16_trains_near_fp32_and_what_trains_is_fp32(method: dict[str, Any], base: str, tmp_path: Path) -> None:
    exact = torch.tensor(losses(trained(tmp_path / "fp32", model=base, method=method)))
    for setting in ("dtype", "autocast"):
        folder = trained(tmp_path / setting, model=base, method=method, **{setting: "bf16"})
        rough = torch.tensor(losses(folder))
        assert not torch.equal(exact, rough) and torch.allclose(exact, rough, atol=0.05), setting
        for file in folder.glob("adapter/*.safetensors"):
            kinds = {name: values.dtype for name, values in load_file(file).items()}
            assert set(kinds.values()) == {torch.float32}, kinds


@pytest.mark.large
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bf16"},
        *(
            pytest.param(each, marks=pytest.mark.large)
            for each in ({"autocast": "bf16"}, {"micro_batch": 4, "gradient_checkpointing": True})
        ),
    ],
    ids=str,
)
def test_a_run_that_is_cut_goes_on_bit_for_bit(
    settings: dict[str, Any], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(tmp_path / "alone", model=base, method=SIMPLEX, **settings)
    folder = make(tmp_path / "run", model=base, method=SIMPLEX, **settings)
    step, taken = RunTrainer.training_step, [0]

    class Cut(BaseException):
        pass

    def cut(*args: Any, **more: Any) -> Any:
        taken[0] += 1
        if taken[0] == 8:
            raise Cut
        return step(*args, **more)

    monkeypatch.setattr(RunTrainer, "training_step", cut)
    with pytest.raises(Cut):
        run(folder)
    assert last_complete(folder) is not None
    run(folder)
    for file in ("adapter/adapter_model.safetensors", "metrics.jsonl", "ranks.jsonl"):
        assert (folder / file).read_bytes() == (alone / file).read_bytes(), file


def test_weights_of_bf16_are_loaded_as_such_and_the_adapter_fits_them(base: str, tmp_path: Path) -> None:
    task = tasks.build("stdlib-kind")
    model, _, _ = build(base, task, 16, loading=arguments.Loading(dtype="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    folder = trained(tmp_path / "run", model=base, dtype="bf16")
    with quiet():
        stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.bfloat16)
        adapted = PeftModel.from_pretrained(stock, str(folder / "adapter"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(adapted(input_ids=torch.tensor([[101, 7592, 102]])).logits).all()


def test_a_field_of_the_trainer_reaches_it(base: str, tmp_path: Path) -> None:
    one, other = (
        trained(tmp_path / str(beta), model=base, trainer={"adam_beta2": beta}, max_steps=4) for beta in (0.5, 0.9)
    )
    assert losses(one)[:2] == losses(other)[:2] and losses(one) != losses(other)


def test_what_can_be_given_to_the_trainer_is_taken() -> None:
    given = {"adam_beta1": 0.8, "lr_scheduler_kwargs": {"num_cycles": 2}, "neftune_noise_alpha": 5}
    arguments.check(config(trainer=given, schedule="cosine"))


def config(**settings: Any) -> RunConfig:
    return RunConfig(task={"name": "stdlib-kind"}, **settings)


def test_no_field_of_the_trainer_is_ours_and_the_users_at_once() -> None:
    """Each field that `arguments` sets can be set in one place only, and the setting that a message names exists."""
    source = inspect.getsource(arguments.arguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    set_here = set(re.findall(r"^            (\w+)=", source, re.MULTILINE))
    ours = known - {*arguments._PASSED_ON}
    assert set_here - ours == set() and len(set_here) > 15
    assert {*arguments._INSTEAD.values()} <= {*RunConfig.model_fields}
    for name in ours & known:
        assert refused(lambda name=name: arguments.check(config(trainer={name: 1}))).startswith(f"trainer.{name}: ")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainer": {"adam_beta_2": 0.9}},
            r'trainer.adam_beta_2: TrainingArguments has no .*\(did you mean "adam_beta2"',
        ),
        ({"trainer": {"num_train_epochs": 2}}, "trainer.num_train_epochs: set epochs of the run instead"),
        ({"trainer": {"save_total_limit": 2}}, "trainer.save_total_limit: a run decides this itself; leave it out"),
        ({"trainer": {"report_to": ["wandb"]}}, "trainer.report_to: set report_to of the run instead"),
        ({"trainer": {"run_name": "mine"}}, "trainer.run_name: a run decides this itself; leave it out"),
        ({"trainer": {"logging_steps": 10}}, "trainer.logging_steps: a run decides this itself; leave it out"),
        ({"trainer": {"adam_beta2": "high"}}, r"trainer.adam_beta2 = 'high': expected number"),
        ({"trainer": {"adam_beta2": "0.9"}}, r"trainer.adam_beta2 = '0.9': expected number"),
        ({"trainer": {"adam_beta2": 2.0}}, "trainer: Invalid beta parameter at index 1: 2.0"),
        ({"trainer": {"adam_epsilon": -1}}, "trainer: Invalid epsilon value: -1"),
        ({"trainer": {"dataloader_num_workers": 2}}, "trainer.dataloader_num_workers: a run decides this itself"),
        (
            {"trainer": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "schedule": "cosine"},
            "trainer.lr_scheduler_kwargs: wrong for schedule = cosine: "
            "got an unexpected keyword argument 'min_lr_rate'",
        ),
        (
            {"trainer": {"lr_scheduler_kwargs": {"num_cycles": 2}}, "schedule": "constant"},
            "trainer.lr_scheduler_kwargs: wrong for schedule = constant: it takes none",
        ),
        ({"trainer": {"lr_scheduler_kwargs": {"num_cycles": "x"}}, "schedule": "cosine"}, "for schedule = cosine: "),
        ({"trainer": {"lr_scheduler_kwargs": "x"}}, "trainer.lr_scheduler_kwargs: wrong for schedule = linear: "),
        ({"dtype": "fp16"}, "fp16 needs a GPU; use bf16 or fp32"),
        ({"autocast": "fp16"}, "fp16 needs a GPU; use bf16 or fp32"),
        ({"dtype": "bf16", "autocast": "none"}, "autocast = none: weights of dtype bf16 compute in bf16"),
        ({"dtype": "fp8"}, "dtype = 'fp8': expected 'fp32', 'bf16' or 'fp16'"),
        (
            {"dtype": "bf16", "method": {"name": "pissa"}},
            "holds bfloat16 numbers, to which a change would be rounded: load",
        ),
        (
            {"dtype": "bf16", "method": {**SIMPLEX, "empty": "merge"}},
            "holds bfloat16 numbers, to which a change would be",
        ),
        (
            {"dtype": "bf16", "method": "full"},
            "dtype: full trains all weights, which are then fp32; use autocast = bf16",
        ),
        (
            {"dtype": "bf16", "task": {"type": "segmentation", "dataset": "."}},
            "not for segmentation; leave them out",
        ),
        ({"micro_batch": 0}, "micro_batch = 0: expected"),
        ({"attention": "flash_attention_2"}, "(?i)flash"),
        (
            {"model": "random-bert", "task": "mrpc", "gradient_checkpointing": "yes"},
            "gradient_checkpointing = 'yes': expected boolean",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it can be done on a GPU")
def test_what_cannot_be_done_is_refused_in_one_line_before_a_run_begins(settings: dict[str, Any], message: str) -> None:
    given = {"task": "stdlib-kind", **settings}
    said = refused(lambda: Checked.of(given, []))
    assert re.search(message, said), said


def test_a_key_below_trainer_can_be_typed_and_varied() -> None:
    schema = Schema(methods.registry(), tasks.registry())
    one = load({"task": "cola"}, ["trainer.adam_beta2=0.9"], schema)
    assert one.trainer == {"adam_beta2": 0.9}  # type: ignore[union-attr]
    many = load({"task": "cola", "vary": {"trainer.adam_beta2": [0.9, 0.99]}}, [], schema)
    assert [each.trainer for each in many.configs] == [{"adam_beta2": 0.9}, {"adam_beta2": 0.99}]  # type: ignore[union-attr]
    many = load({"task": "cola", "vary": {"trainer": [{}, {"adam_beta2": 0.9}]}}, ["trainer.adam_beta1=0.5"], schema)
    assert [each.trainer for each in many.configs] == [{"adam_beta1": 0.5}, {"adam_beta2": 0.9, "adam_beta1": 0.5}]  # type: ignore[union-attr]


def test_settings_that_are_as_before_leave_the_ids_of_older_runs() -> None:
    assert config().id == config(dtype="fp32", attention="auto", trainer={}).id
    assert len({config(**each).id for each in ({}, {"dtype": "bf16"}, {"micro_batch": 4}, {"trainer": {"a": 1}})}) == 4
