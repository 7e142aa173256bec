"""One run in its folder: what it leaves behind, what it refuses, and how it fails."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankwise
from rankwise import methods, tasks
from rankwise.adapters.stored import padding, stored
from rankwise.errors import InputError
from rankwise.files import claim
from rankwise.processes.stop import Stop
from rankwise.runs.maker import Maker
from rankwise.runs.store import Store
from rankwise.settings import Schema, load
from rankwise.tasks import subset
from rankwise.tasks.classification import logits
from rankwise.train import model as models
from rankwise.train.checkpoint_files import last_complete, mark_complete
from rankwise.train.progress import DivergedError, Plan
from rankwise.train.run import code_for, run
from runs import LORA, SETTINGS, SIMPLEX, lines, make
from waiting import reached, wait_for

HEAD = {"name": "head"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("runs") / "run", model=None, method=SIMPLEX)
    (folder / "error.txt").write_text("of an earlier try")
    run(folder)
    return folder


def test_a_finished_run_leaves_all_its_files_and_no_others(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("run.yaml", "run.lock", "env.json", "metrics.jsonl", "ranks.jsonl", "predictions.parquet", "adapter"),
        *("answers.json", "data.json", "result.json"),
    }


def test_the_result_says_all_that_a_table_needs_and_no_path(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert (result["run"], result["task"], result["method"]) == ("0123456789ab", "stdlib-kind", "simplex-lora")
    assert (result["model"], result["seed"], result["learning_rate"]) == ("minilm-l6", 0, 5e-3)
    assert result["options"]["every"] == 3 and result["options"]["targets"] == "all-linear"
    assert result["score"] == "accuracy" and set(result["metrics"]) == {"accuracy"}
    assert result["splits"]["train"]["rows"] == 72
    assert [split["rows"] for split in result["splits"]["evaluation"]] == [24]
    assert result["splits"]["train"]["official"] is False and result["splits"]["train"]["note"]
    assert all(value > 0 for value in result["cost"].values()) and set(result["cost"]) == {
        *("seconds", "peak_memory_bytes", "examples_per_second", "adapter_bytes")
    }
    assert str(finished.parent) not in json.dumps(result)
    (spread,), (detail,) = result["answers"], json.loads((finished / "answers.json").read_text())
    rows = pyarrow.parquet.read_table(finished / "predictions.parquet").to_pylist()
    assert spread["total"] == sum(count for *_, count in detail["confusion"]) == len(rows) == 24
    wrong = {row["idx"]: (row["label"], row["prediction"]) for row in rows if row["label"] != row["prediction"]}
    assert {each["idx"]: (each["true"], each["given"]) for each in detail["wrong"]}.items() <= wrong.items()
    answered = [detail["classes"][row["prediction"]] for row in rows]
    assert spread["count"] == answered.count(spread["commonest"]) == max(map(answered.count, answered))


@pytest.mark.large
@pytest.mark.parametrize("seed", [0, 1])
def test_by_default_a_search_changes_ranks_and_says_at_how_many_sites(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"name": "simplex-lora", "rank": 4}  # T = 10, K = 3
    folder = make(
        tmp_path / "run",
        model=None,
        method=chosen,
        seed=seed,
        max_steps=32,
        learning_rate=1e-3,
        train_rows=480,
        max_length=24,
        checkpoint_every=40,
    )
    search = run(folder)["search"]
    first, *_, last = lines(folder / "ranks.jsonl")
    assert search["changed"] == sum(rank != 4 for rank in last["ranks"].values()) >= len(first["ranks"]) / 3
    assert search["sites"] == len(first["ranks"]) and search["moved"] > 0.5 and not search["advice"]
    assert (
        f"simplex-lora: ranks changed at {search['changed']} of 37 sites, and ω moved by up to "
        in capsys.readouterr().err
    )


def test_parameters_are_counted_without_the_head_and_at_their_peak(finished: Path) -> None:
    counted = json.loads((finished / "result.json").read_text())["parameters"]
    # MiniLM: 6 layers of four maps 384 x 384 and two of 384 x 1536, and the pooler; r = 4; one ω a site in the search.
    budget = 4 * (6 * (4 * 768 + 2 * 1920) + 768)
    assert counted["budget"] == budget and counted["head"] == 384 * 3 + 3
    assert counted["trainable"] == budget + 37
    assert budget - 768 < counted["final"] <= budget


def test_the_lines_tell_the_course_of_the_run(finished: Path) -> None:
    found = lines(finished / "metrics.jsonl")
    assert found[0] == {"step": 0, "steps": 12}
    losses = [line for line in found if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 13))
    assert losses[4]["epoch"] == 1.0 and losses[-1]["epoch"] == 2.4
    assert losses[0]["learning_rate"] == 0.0 and losses[1]["learning_rate"] == 5e-3
    evaluations = [line for line in found if "eval" in line]
    assert [line["step"] for line in evaluations] == [5, 10, 12]
    assert all(set(line["eval"]) == {"loss", "accuracy"} for line in evaluations)
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_the_predictions_give_the_metrics_and_are_of_the_rows_they_name(finished: Path) -> None:
    table = pyarrow.parquet.read_table(finished / "predictions.parquet")
    assert table.column_names == ["split", "idx", "label", "prediction", "logits"]
    columns = {name: np.array(table.column(name).to_pylist()) for name in table.column_names}
    assert (columns["logits"].argmax(axis=1) == columns["prediction"]).all()
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    assert (columns["label"] == columns["prediction"]).mean() == pytest.approx(metrics["accuracy"])
    rows = subset(tasks.build("stdlib-kind").evaluation()[0], 24).data
    assert columns["idx"].tolist() == rows["idx"][:] and columns["label"].tolist() == rows["label"][:]


def test_stock_peft_gets_from_the_adapter_what_the_run_predicted(finished: Path) -> None:
    task = tasks.build("stdlib-kind")
    split = subset(task.evaluation()[0], 24)
    torch.manual_seed(1)  # another head than the run began with: the adapter brings its own
    base, tokenizer, _ = models.build(None, task, 16)
    model = PeftModel.from_pretrained(base, str(finished / "adapter"))
    found = logits(model, task.encode(split, tokenizer, 16), tokenizer, batch_size=5)
    kept = pyarrow.parquet.read_table(finished / "predictions.parquet").column("logits").to_pylist()
    np.testing.assert_allclose(found, np.array(kept), atol=1e-5)


def test_a_finished_run_is_returned_untouched(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "run.lock"}
    assert run(finished) == json.loads((finished / "result.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "run.lock"}


@pytest.mark.parametrize("text", ["", '{"run": "0123456789ab"', '{"run": "another", "metrics": {}}', "[]"])
def test_half_a_result_or_a_foreign_one_does_not_count(text: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", method=HEAD, max_steps=1, eval_rows=4)
    (folder / "result.json").write_text(text)
    assert run(folder)["run"] == "0123456789ab"
    assert json.loads((folder / "result.json").read_text())["metrics"]


def test_head_trains_the_head_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", model=None, method=HEAD, eval_every=6)
    result = run(folder)
    assert result["parameters"] == {"trainable": 0, "final": 0, "budget": 0, "head": 1155}
    assert [line["ranks"] for line in lines(folder / "ranks.jsonl")] == [{}]
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "eval" in line] == [6, 12]
    base, _, _ = models.build(None, tasks.build("stdlib-kind"), 16)
    start = base.classifier.weight.detach().clone()
    trained = rankwise.load(base, folder / "adapter")
    assert not torch.equal(start, trained.classifier.weight)


def test_all_weights_are_saved_as_a_model_that_others_load_and_runs_begin_with(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", model=None, method={"name": "full"}, max_steps=2, learning_rate=1e-4)
    result = run(folder)
    assert not (folder / "adapter").exists() and result["cost"]["adapter_bytes"] > 2**26  # bytes
    task = tasks.build("stdlib-kind")
    split = subset(task.evaluation()[0], 24)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = logits(model, task.encode(split, tokenizer, 16), tokenizer, batch_size=5)
    kept = pyarrow.parquet.read_table(folder / "predictions.parquet").column("logits").to_pylist()
    np.testing.assert_allclose(found, np.array(kept), atol=1e-5)
    after = make(tmp_path / "after", method=HEAD, max_steps=1, model=str(folder / "model"))
    assert run(after)["model"] == "model"


LONG = {"max_steps": 30, "eval_every": 20, "checkpoint_every": 20}  # long enough to be stopped on its way


Terminate = Callable[..., None]


@pytest.fixture
def terminate() -> Iterator[Terminate]:
    """Send this process a signal once the run in a folder has done a step."""
    both = (signal.SIGTERM, signal.SIGINT)
    before = {how: signal.signal(how, signal.SIG_IGN) for how in both}  # should the run be over by then

    def watch(folder: Path, step: int, how: signal.Signals) -> None:
        wait_for(lambda: reached(folder, step))
        os.kill(os.getpid(), how)

    def start(folder: Path, step: int, how: signal.Signals = signal.SIGTERM) -> None:
        threading.Thread(target=watch, args=(folder, step, how), daemon=True).start()

    yield start
    for how, handler in before.items():
        signal.signal(how, handler)


def test_head_goes_on_where_it_was_stopped_and_time_adds_up(terminate: Terminate, tmp_path: Path) -> None:
    alone, folder = (make(tmp_path / name, method=HEAD, **LONG) for name in ("alone", "run"))
    whole = run(alone)
    terminate(folder, 4)
    with pytest.raises(SystemExit) as caught:
        run(folder)
    assert caught.value.code == 75
    age(folder, 1e6)
    resumed = run(folder)
    assert {**whole, "cost": None} == {**resumed, "cost": None}
    assert 1e6 < resumed["cost"]["seconds"] < 2e6
    for name in ("metrics.jsonl", "ranks.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.large
@pytest.mark.parametrize("name", ["ranks.jsonl", "metrics.jsonl"])
def test_lines_that_were_lost_or_changed_between_two_starts_change_no_result(
    name: str, finished: Path, terminate: Terminate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First all are gone, and it begins anew; then the newest is another, and it goes on from an earlier checkpoint."""
    folder = make(tmp_path / "run", model=None, method=SIMPLEX)
    for step, damage, onwards in (
        (4, lambda text: "", "starting again"),
        (8, lambda text: text[:-3] + "0}\n" if name == "metrics.jsonl" else text.replace("1", "2"), ""),
    ):
        terminate(folder, step)
        with pytest.raises(SystemExit):
            run(folder)
        (folder / name).write_text(damage((folder / name).read_text()))
        capsys.readouterr()
        last_complete(folder)
        said = capsys.readouterr().err
        assert f"{name} has changed" in said and said.count("\n") == 1 and onwards in said
    run(folder)
    found, wanted = (json.loads((each / "result.json").read_text()) for each in (folder, finished))
    del found["cost"], wanted["cost"]
    assert found == wanted
    for each in ("ranks.jsonl", "metrics.jsonl"):
        assert (folder / each).read_bytes() == (finished / each).read_bytes()


def test_ctrl_c_leaves_a_checkpoint_too_and_says_how_to_go_on(
    terminate: Terminate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "run", method=HEAD, **LONG)
    terminate(folder, 4, signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        run(folder)
    assert caught.value.code == 130
    checkpoint, _ = last_complete(folder) or pytest.fail("no checkpoint was left")
    step = checkpoint.name.removeprefix("checkpoint-")
    assert capsys.readouterr() == ("", f"stopped after step {step}; the same command goes on from there\n")


def test_only_a_second_ctrl_c_cuts_the_step_short() -> None:
    stop = Stop()
    with stop.patient():
        stop.on_signal(signal.SIGTERM)
        stop.on_signal(signal.SIGTERM)
        assert (stop.asked, stop.code) == (True, 75)
        with pytest.raises(SystemExit) as caught:
            stop.on_signal(signal.SIGINT)
    assert caught.value.code == 130


def age(folder: Path, seconds: float) -> None:
    """Let the newest checkpoint say that it took that much longer."""
    checkpoint, carried = last_complete(folder) or pytest.fail("no checkpoint was left")
    mark_complete(checkpoint, {**carried, "seconds": carried["seconds"] + seconds})


def test_a_run_that_cannot_write_says_so_and_can_be_run_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", method=HEAD, max_steps=1, eval_rows=4)
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="is a folder where a file should be; move it away"):
        run(folder)
    assert "metrics.jsonl" in (folder / "error.txt").read_text().splitlines()[0]
    (folder / "metrics.jsonl").rmdir()
    run(folder)
    assert not (folder / "error.txt").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    """Of two steps of warm-up the first has rate 0, so the weights break at the second and the loss at the third."""
    folder = make(tmp_path / "run", learning_rate=1e30, warmup=2, checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step 3") as caught:
        run(folder)
    first, _, traceback = (folder / "error.txt").read_text().partition("\n")
    assert first == str(caught.value) and "DivergedError" in traceback
    checkpoint, _ = last_complete(folder) or pytest.fail("no checkpoint was kept")
    assert checkpoint.name == "checkpoint-2"
    assert all(weight.isfinite().all() for weight in load_file(checkpoint / "adapter_model.safetensors").values())
    assert all(np.isfinite(row["loss"]) for row in lines(folder / "metrics.jsonl") if "loss" in row)
    assert not (folder / "result.json").exists()


def test_gates_that_are_not_finite_have_diverged_like_a_loss(tmp_path: Path) -> None:
    """So that a rate which breaks them is out of the contest, and not begun again."""
    folder = make(tmp_path / "run", model=None, method={"name": "sora", "rank": 2, "gate_rate": 1e38}, max_steps=4)
    with pytest.raises(DivergedError, match="gates are not finite after step"):
        run(folder)
    assert Store(tmp_path).failure(folder).diverged


def test_settings_that_cannot_be_read_leave_a_finished_run_finished(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    whole = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text("id: [")
    with pytest.raises(InputError):
        run(folder)
    assert not (folder / "error.txt").exists()
    (folder / "run.yaml").write_text(whole)
    assert Store(tmp_path).state(folder) == "done"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    (folder / "run.lock").symlink_to(tmp_path / "missing" / "run.lock")  # what root, too, cannot open for writing
    with pytest.raises(InputError, match="run: cannot be written to"):
        run(folder)


@pytest.mark.large
def test_a_finished_run_is_returned_from_a_folder_that_cannot_be_written_to(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "run.lock").unlink()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "missing" / "run.lock")
    assert run(tmp_path / "run")["run"] == "0123456789ab"


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    with filelock.FileLock(folder / "run.lock"), pytest.raises(InputError, match="another process"):
        run(folder)
    assert not (folder / "error.txt").exists()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"task": "stdlib-kid"}, "stdlib-kind"),
        ({"method": {"name": "lora", "rnk": 2}}, "rank"),
        ({"method": {"name": "lora", "targets": ["qery"]}}, "query"),
        ({"method": {"name": "lora", "rank": 385}}, "rank 385 is too large"),
        ({"max_length": 600}, "max_length 600: more"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"id": ""}, "id"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_stays_in_the_folder(
    settings: dict[str, Any], line: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "run", **settings)
    with pytest.raises(InputError, match=line) as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "error.txt").read_text().splitlines()[0] == str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.yaml"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(make(tmp_path / "run", method=LORA, max_steps=1, eval_rows=4))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def similarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A little STS-B in a folder of one's own: pairs of sentences and how alike they are."""
    folder = tmp_path / "data" / "glue" / "stsb"
    folder.mkdir(parents=True)
    words = ["a cat sits", "a dog runs", "the sun is out", "rain falls on the roof"]
    for name, rows in (("train", 16), ("validation", 8)):
        pairs = [(words[i % 4], words[(i + i // 4) % 4]) for i in range(rows)]
        columns = {
            "sentence1": [a for a, _ in pairs],
            "sentence2": [b for _, b in pairs],
            "label": [5.0 if a == b else 0.25 * (i % 5) for i, (a, b) in enumerate(pairs)],
            "idx": list(range(rows)),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "data"))
    yield


@pytest.mark.usefixtures("similarity")
def test_a_regression_runs_on_pairs(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", task="stsb", max_steps=3, batch_size=8, train_rows=None, eval_rows=None)
    result = run(folder)
    assert set(result["metrics"]) == {"pearson", "spearman"} and result["splits"]["train"]["rows"] == 16
    table = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    assert table["label"][0] == 5.0
    assert table["prediction"] == [each[0] for each in table["logits"]]


def test_answers_do_not_depend_on_the_order_or_the_batches() -> None:
    task = tasks.build("stdlib-kind")
    split = subset(task.evaluation()[0], 12)
    model, tokenizer, _ = models.build(None, task, 64)
    model.train()
    tokens = task.encode(split, tokenizer, 64)
    at_once, singly = (logits(model, tokens, tokenizer, size) for size in (12, 1))
    np.testing.assert_allclose(at_once, singly, atol=1e-5)
    assert model.training


def test_examples_are_counted_with_the_short_batch_at_the_end_of_an_epoch() -> None:
    plan = Plan(rows=72, batch_size=16, steps=500, eval_every=5, checkpoint_every=5)
    assert [plan.examples(step) for step in (0, 1, 4, 5, 6, 10)] == [0, 16, 64, 72, 88, 144]
    assert plan.line_every == 3


SORA = {"name": "sora", "rank": 2, "gate_rate": 0.1, "sparsity": 1.0}


def test_the_ranks_of_gates_are_in_the_lines_and_what_is_left_in_the_result(tmp_path: Path) -> None:
    method = {**SORA, "sparsity": 4.0, "gates": "normal", "rank": 4}
    folder = make(tmp_path / "runs" / "run", method=method, max_steps=8)
    result = run(folder)
    found = lines(folder / "ranks.jsonl")
    left = sum(found[-1]["ranks"].values())
    assert 0 < left < sum(found[0]["ranks"].values())
    assert result["parameters"]["final"] < result["parameters"]["budget"] < result["parameters"]["trainable"]
    saved = stored(folder / "adapter")
    assert sum(layer.rank for layer in saved.layers.values()) == left
    cost = sum(layer.rank * saved.cost(name) for name, layer in saved.layers.items())
    assert padding(saved) > 0 and 4 * cost < result["cost"]["adapter_bytes"] < 4 * cost + padding(saved)


def test_a_run_is_noted_as_made_by_the_code_that_trained_it(tmp_path: Path) -> None:
    """Whichever code made its folder, unless other code has started the run."""
    store = Store(tmp_path / "runs")
    config = load(
        {**SETTINGS, "method": HEAD, "max_steps": 1, "id": "", "made_with": {}},
        [],
        Schema(methods.registry(), tasks.registry()),
    )
    other = Maker.now("other data", {"methods/subset.py": {"Head": "0"}})
    folder = store.create(config, other)
    claim(folder, "checkpoint-3")
    begun = folder / "checkpoint-3"
    begun.mkdir()
    (begun / "complete.json").write_text("{}")
    with pytest.raises(InputError, match="was started with other code and other data: .*--reuse.*--repeat"):
        run(folder)
    shutil.rmtree(begun)
    run(folder)
    made = Maker.now(tasks.build("stdlib-kind").revision(), code_for(config))
    assert store.maker(folder) == made and store.others({folder: made}) == {}
    assert "Head" in json.loads((folder / "maker.json").read_text())["code"]["methods/subset.py"]
