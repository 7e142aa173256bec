"""The smallest adapter within a tolerance: what is tried, what is chosen, what is written, and what survives a kill."""

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import rankwise as rw
import runs
import warm
from rankwise.adapters.stored import stored
from rankwise.commands.shrink import STEP, Asked, Half, Shrunk
from rankwise.commands.smaller import retraining
from rankwise.errors import InputError
from rankwise.nets import recomputed
from rankwise.nets.lora_linear import LoraLinearFunction
from rankwise.runs import run_file
from rankwise.train.run import run

WORDS = {"yes": ["good", "fine", "great", "nice"], "no": ["bad", "poor", "awful", "wrong"]}
OTHERS = ["the", "and", "house", "tree", "water", "road", "light", "people", "day", "work"]


def write_rows(file: Path, count: int, draw: random.Random) -> None:
    """Rows whose label hangs on one of their words, except for one in twenty."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["text", "label"])
        for number in range(count):
            label = draw.choice(["yes", "no"])
            words = [*draw.sample(OTHERS, 4), draw.choice(WORDS[label])]
            draw.shuffle(words)
            wrong = draw.random() < 0.05
            writer.writerow([f"{' '.join(words)} {number}", "yes" if (label == "no") == wrong else "no"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, `runs/run`, and the settings to score it by, `mine.yaml`."""
    folder = tmp_path_factory.mktemp("made")
    draw = random.Random(0)
    write_rows(folder / "train.csv", 400, draw)
    write_rows(folder / "validation.csv", 200, draw)
    settings = {
        "task": {"type": "classification", "dataset": str(folder), "columns": {"text": "text", "label": "label"}},
        "model": runs.bert(folder / "bert"),
        "method": {"name": "lora", "rank": 4},
        "max_length": 16,
        "batch_size": 32,
        "learning_rate": 1e-2,
    }
    more = {"max_steps": 100, "train_rows": None, "eval_rows": None, "checkpoint_every": 10**4, "eval_every": 0}
    result = run(runs.make(folder / "runs" / "run", **settings, **more))
    assert result["metrics"]["accuracy"] > 0.8  # it has learnt
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def found(made: Path) -> Shrunk:
    return rw.shrink(made / "runs" / "run", tolerance=0.03, out=made / "small")


def settings_of(made: Path) -> dict[str, object]:
    return yaml.safe_load((made / "mine.yaml").read_text())


def test_what_is_chosen_passes_and_the_next_smaller_one_does_not(made: Path, found) -> None:
    assert found.best is not None and found.best.passes
    assert 0 < found.best.parameters < found.given.parameters == 3_840
    assert min(found.best.chosen.interval) >= -0.03 - 1e-9
    smaller = [attempt for attempt in found.attempts if attempt.budget < found.best.budget]
    assert not any(attempt.passes for attempt in smaller)
    assert max((attempt.budget for attempt in smaller), default=0) * STEP >= found.best.budget * 0.99 or not smaller
    assert found.rows == (100, 100)
    assert found.given.chosen == Half(found.given.chosen.score, 0.0, (0.0, 0.0))


def test_what_is_written_is_what_was_scored(made: Path, found) -> None:
    """Scored again from its folder, as anyone would, it answers what the two halves say."""
    written = stored(made / "small")
    ranks = {name: written.rank(name) for name in written.names}
    assert sum(written.cost(name) * rank for name, rank in ranks.items()) == found.best.parameters
    assert (made / "small" / "adapter_model.safetensors").stat().st_size == found.best.bytes
    [scored] = rw.evaluate(made / "small", settings=settings_of(made)).scores
    assert scored.metrics["accuracy"] == pytest.approx((found.best.chosen.score + found.best.reported.score) / 2)
    assert not (made / "small.partly").exists()


def test_rows_that_all_score_as_before_do_not_stand_for_all_others(found: Shrunk) -> None:
    """The bootstrap cannot see what happens in none of its rows, however few they are."""
    words = "none of the 100 rows that chose it scores differently; of other rows, up to 3.0% may (95 %)"
    same = replace(found.best, chosen=Half(0.9, 0.0, (0.0, 0.0)))
    assert words in [*replace(found, best=same).lines()]
    other = replace(found.best, chosen=Half(0.9, 0.0, (-0.01, 0.01)))
    assert words not in [*replace(found, best=other).lines()]


def test_the_two_halves_are_all_rows_once(made: Path, found) -> None:
    [whole] = rw.evaluate(made / "runs" / "run").scores
    assert whole.metrics["accuracy"] == pytest.approx((found.given.chosen.score + found.given.reported.score) / 2)


def test_it_says_what_it_found(found, tmp_path: Path) -> None:
    text = "\n".join(found.lines())
    assert "accuracy on 100 rows that choose and 100 that report" in text
    assert len(re.findall("chosen|given$", text, re.MULTILINE)) >= 2
    assert f"{found.best.parameters:,} parameters, " in text
    assert "on the rows that did not choose it: " in text
    content = json.loads(json.dumps(found.as_json()))
    assert content["best"]["parameters"] == found.best.parameters and content["rows"] == {"choose": 100, "report": 100}
    picture = found.save_picture(tmp_path / "curve.svg").read_text()
    assert picture.startswith("<?xml") and "</svg>" in picture
    assert " KiB" in picture and "$" not in picture  # sizes as people write them, no formulas


@pytest.mark.large
def test_more_tolerance_is_not_larger_and_none_keeps_what_is_as_good(made: Path, found) -> None:
    least = rw.shrink(made / "runs" / "run", tolerance=1.0, out=made / "least")
    assert least.best.parameters == 64  # the cheapest unit of rank
    [layer] = stored(made / "least").names
    assert stored(made / "least").rank(layer) == 1
    exact = rw.shrink(made / "runs" / "run", tolerance=0, out=made / "exact")
    assert exact.best is None or exact.best.parameters >= found.best.parameters
    given = load_file(made / "runs" / "run" / "adapter" / "adapter_model.safetensors")
    if exact.best is None:
        kept = load_file(made / "exact" / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], given[name]) for name in given)
        assert "no smaller adapter is shown to be not worse" in "\n".join(exact.lines())


@pytest.mark.large
def test_healed_cuts_are_trained_at_their_ranks(made: Path) -> None:
    healed = rw.shrink(made / "runs" / "run", tolerance=1.0, heal=2, out=made / "healed")
    rw.resize_adapter(made / "runs" / "run", made / "cut", budget=healed.best.budget)
    one, other = (load_file(made / name / "adapter_model.safetensors") for name in ("healed", "cut"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert not any(torch.equal(one[name], other[name]) for name in one if ".lora_" in name)
    assert any(not torch.equal(one[name], other[name]) for name in one if "classifier" in name)  # the head too
    assert healed.best.parameters == sum(each.numel() for name, each in other.items() if ".lora_" in name)
    assert "trained on for 2 steps" in "\n".join(healed.lines())


@pytest.mark.large
@pytest.mark.parametrize(
    ("how", "expected"),
    [({"fast": False}, []), ({}, ["fast"]), ({"activation_memory": "lean"}, ["fast", "lean"])],
    ids=str,
)
def test_cuts_are_healed_as_a_run_with_these_settings_trains(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, object], expected: list[str]
) -> None:
    used: set[str] = set()
    monkeypatch.setattr(recomputed, "SMALL", 0)
    for name, kind, call in (("fast", LoraLinearFunction, "forward"), ("lean", recomputed.Recipe, "value")):
        own = getattr(kind, call)
        monkeypatch.setattr(kind, call, lambda *args, name=name, own=own: used.add(name) or own(*args))
    given = {**settings_of(made), **how}
    rw.shrink(made / "runs" / "run", given, tolerance=1.0, heal=1, out=tmp_path / "healed")
    assert sorted(used) == expected


def test_retrained_adapters_are_small_from_the_start(made: Path) -> None:
    steps = ["max_steps=20", "eval_rows=60"]
    found = rw.shrink(made / "runs" / "run", settings=steps, tolerance=1.0, retrain=True, out=made / "retrained")
    tensors = load_file(made / "retrained" / "adapter_model.safetensors")
    spent = sum(each.numel() for name, each in tensors.items() if ".lora_" in name)
    assert spent == found.best.parameters <= found.best.budget and 2 * spent < found.given.parameters
    sizes = [attempt.bytes for attempt in found.attempts]
    assert sizes == sorted(sizes) and len({*sizes}) > 1  # no zeros in between
    assert found.best.budget == min(attempt.budget for attempt in found.attempts) == 96  # the dearest unit
    assert "trained from the start at rate 0.03" in "\n".join(found.lines())
    settings = {**settings_of(made), "eval_rows": 60}
    [scored] = rw.evaluate(made / "retrained", settings=settings).scores
    assert scored.metrics["accuracy"] == pytest.approx((found.best.chosen.score + found.best.reported.score) / 2)
    assert not (made / "retrained.partly").exists()
    assert "changed after training" not in (made / "retrained" / "README.md").read_text()


@pytest.mark.parametrize(("budget", "rate"), [(96, 0.03), (959, 0.03), (960, 0.01), (3_000, 0.01)])
def test_what_is_retrained_has_the_layers_the_scale_and_the_rate_of_the_given_one(made: Path, budget, rate) -> None:
    asked = Asked.of(made / "runs" / "run", None, (), tolerance=0.1, out=made / "x", retrain=True)
    again = retraining(asked.adapter, asked.training, budget)
    assert again.learning_rate == pytest.approx(rate)
    own = {"name": "spaced-lora", "rank": 4, "mean_rank": budget / 960, "targets": [*asked.adapter.names]}
    assert again.method == {**asked.training.method, **own}  # alpha too: s is that of the file
    small = asked.training.model_copy(update={"method": {"name": "spaced-lora", "mean_rank": 0.5}})
    assert retraining(asked.adapter, small, budget).learning_rate == pytest.approx(0.01)  # which is that of a small one


def test_a_run_is_retrained_and_healed_by_its_own_settings(made: Path, tmp_path: Path) -> None:
    more = {"batch_size": 8, "micro_batch": 4, "train_rows": 40, "eval_rows": 20, "seed": 3, "clip": 0.5, "warmup": 3}
    more |= {"max_steps": 4, "schedule": "cosine", "weight_decay": 0.1, "label_smoothing": 0.1, "checkpoint_every": 9}
    more |= {"scale": "small", "trainer": {"adam_beta2": 0.9}, "eval_every": 4}
    folder = runs.make(tmp_path / "runs" / "run", **{**settings_of(made), **more})
    run(folder)
    noted = run_file.load(folder).config.model_dump()
    for source in (None, folder):
        asked = Asked.of(folder, source, (), tolerance=0.1, out=tmp_path / "x", retrain=True)
        found = asked.training.model_dump()
        for name in ("task", "method"):  # with the defaults of their options written out
            assert {**found[name], **noted[name]} == found[name]
        lost = {key for key, value in noted.items() if found[key] != value} - {"task", "method"}
        assert lost <= {"scale", "runs"}
    assert Asked.of(folder, None, ["seed=5"], tolerance=0.1, out=tmp_path / "x", heal=1).training.seed == 5


@pytest.mark.parametrize("how", [["--heal", 2], ["--retrain"]])
def test_without_a_run_it_is_not_trained_by_the_defaults(made: Path, tmp_path: Path, cli, how) -> None:
    shutil.copytree(made / "runs" / "run" / "adapter", tmp_path / "adapter")
    task = f"task={json.dumps(settings_of(made)['task'])}"
    code, _, err = cli("shrink", tmp_path / "adapter", "--tolerance", 0.1, "-o", tmp_path / "out", *how, task)
    assert code == 2 and "nothing says how it was trained: give its run's folder" in err and err.count("\n") == 1


def test_a_training_that_diverges_says_at_which_rate(made: Path, tmp_path: Path, cli) -> None:
    how = ["--retrain", "max_steps=20", "eval_rows=60", "learning_rate=1e9", "clip=0"]
    code, _, err = cli("shrink", made / "runs" / "run", "--tolerance", 1, "-o", tmp_path / "out", *how)
    last = err.splitlines()[-1]
    assert (
        code == 2 and "parameters at rate " in last and last.endswith("give a smaller one, as in learning_rate=3.3e+08")
    ), err


@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 400))
def test_budgets_go_from_one_unit_to_less_than_all(rank: int, inputs: int, outputs: int) -> None:
    class Layers:
        names = ("a", "b")
        layers = {name: type("Layer", (), {"rank": rank, "size": (inputs, outputs)}) for name in names}

        def rank(self, name: str) -> int:
            return rank

        def cost(self, name: str) -> int:
            return inputs + outputs

    asked = Asked(Layers(), None, 0.1, 0, False, Path("out"))  # type: ignore[arg-type]
    found = asked.budgets
    assert found[0] == inputs + outputs and found[-1] < asked.total
    assert found == sorted(found)
    assert all(after <= (before + 1) * STEP for before, after in zip(found, [*found[1:], asked.total], strict=True))


@pytest.mark.parametrize(
    ("metric", "interval", "passes"),
    [
        ("accuracy", (-0.01, 0.5), True),
        ("accuracy", (-0.02, 0.5), False),
        ("perplexity", (-5.0, 0.01), True),
        ("perplexity", (-5.0, 0.02), False),
    ],
)
def test_the_worse_end_of_the_interval_decides(monkeypatch: pytest.MonkeyPatch, metric, interval, passes) -> None:
    monkeypatch.setattr(Asked, "metric", metric)
    asked = Asked(None, None, 0.01, 0, False, Path("out"))  # type: ignore[arg-type]
    assert asked.within(Half(0.5, 0.0, interval)) is passes


def test_what_cannot_be_shrunk_is_refused_in_one_line(made: Path, found, cli, tmp_path: Path) -> None:
    adapter = made / "runs" / "run" / "adapter"

    def refused(*arguments: object) -> str:
        code, out, err = cli("shrink", *arguments)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        return err

    out = ["-o", tmp_path / "out"]
    assert "nothing next to it says where its rows are" in refused(made / "small", "--tolerance", 0.1, *out)
    settings, numbers = settings_of(made), tmp_path / "numbers.yaml"
    task = {**settings["task"], "type": "regression", "metrics": ["spearman"]}
    numbers.write_text(yaml.safe_dump({**settings, "task": task}))
    assert "is not a sum over them" in refused(adapter, "--data", numbers, "--tolerance", 0.1, *out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").touch()
    assert "--force to replace it" in refused(made / "runs" / "run", "--tolerance", 0.1, *out)
    both = ["--heal", 3, "--retrain", "--tolerance", 0.1, "-o", tmp_path / "other"]
    assert "leave one of them out" in refused(made / "runs" / "run", *both)
    wider = tmp_path / "wider.yaml"
    wider.write_text(yaml.safe_dump({**settings, "model": None}))
    other = ["-o", tmp_path / "other"]
    assert "has other weights than the model" in refused(adapter, "--data", wider, "--tolerance", 0.1, *other)


def test_two_at_once_do_not_disturb_each_other(made: Path) -> None:
    import filelock

    work = made / "both.partly"
    work.mkdir()
    with filelock.FileLock(work / "lock"), pytest.raises(InputError, match="another process is at work on it"):
        rw.shrink(made / "runs" / "run", tolerance=0.1, out=made / "both")


def test_a_folder_of_ones_own_in_the_place_of_what_was_tried_stays(made: Path) -> None:
    mine = made / "taken.partly" / "mine"
    mine.mkdir(parents=True)
    (mine.parent / ".asked.json.0123abcd.rankwise").touch()  # as a kill leaves it, and no reason to refuse
    with pytest.raises(
        InputError, match=r"taken\.partly holds mine, which is no part of an unfinished `rankwise shrink`"
    ):
        rw.shrink(made / "runs" / "run", tolerance=0.1, out=made / "taken")
    assert mine.is_dir()


def test_what_another_adapter_has_left_is_not_used(made: Path, found) -> None:
    """A folder of an earlier call about something else is emptied first."""
    work = made / "again.partly" / "3840"
    work.mkdir(parents=True)
    (work / "attempt.json").write_text('{"parameters": 1, "bytes": 1}')
    (made / "again.partly" / "asked.json").write_text('"another"')
    again = rw.shrink(made / "runs" / "run", tolerance=0.03, out=made / "again")
    assert again.as_json() | {"folder": ""} == found.as_json() | {"folder": ""}


def test_what_was_tried_on_other_rows_is_not_used(made: Path, tmp_path: Path) -> None:
    """As many rows, and the same settings: only the texts differ."""
    data = tmp_path / "data"
    shutil.copytree(made, data, ignore=lambda folder, names: {name for name in names if not name.endswith(".csv")})
    settings = settings_of(made)
    settings["task"]["dataset"] = str(data)

    def asked():
        return Asked.of(made / "runs" / "run", settings, (), tolerance=0.03, out=tmp_path / "small")

    before = asked().digest
    assert asked().digest == before
    rows = (data / "validation.csv").read_text()
    (data / "validation.csv").write_text(rows.replace("house", "garden"))
    assert asked().digest != before


@pytest.mark.large
@pytest.mark.parametrize(
    "how", [["--heal", 0], ["--heal", 4], ["--retrain", "max_steps=12", "checkpoint_every=3"]], ids=str
)
def test_killed_again_and_again_the_same_command_ends_with_the_same(
    made: Path, tmp_path: Path, how: list[object]
) -> None:
    answers, work = {}, tmp_path / "killed.partly"
    for name, kills in (("undisturbed", 0), ("killed", 4)):
        arguments = [made / "runs" / "run", "--tolerance", 0.03, *how, "--json", "-o", tmp_path / name]
        while True:
            command = [sys.executable, "-m", "rankwise", "shrink", *map(str, arguments)]
            process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            done = len(list(work.glob("*/attempt.json")))
            while kills and process.poll() is None:
                if len(list(work.glob("*/attempt.json"))) > done:
                    time.sleep(0.01 * kills)  # into the next one
                    process.kill()
                    kills -= 1
                    break
                time.sleep(0.005)
            out, err = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, err
        answers[name] = {**json.loads(out), "folder": ""}
        assert kills == 0 and not work.exists()
    assert answers["undisturbed"] == answers["killed"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()
