"""The command line as a user meets it: what it prints where, its exit codes, and a sweep that is killed for real."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import models
import warm
from rankwise import tasks
from rankwise.cli import main
from rankwise.runs import run_file
from rankwise.runs.maker import Maker
from rankwise.runs.store import Store
from rankwise.sweep.compare import Outcome
from rankwise.train.arguments import Loading
from rankwise.train.model import build, quiet
from runs import REVISION, config, finish, result, tune
from waiting import PATIENCE, wait_for, writers

TINY = {
    "task": "stdlib-kind",
    "max_steps": 100,
    "batch_size": 4,
    "max_length": 8,
    "train_rows": 240,
    "eval_rows": 16,
    "checkpoint_every": 30,
}

NAME = "x" * 5_000  # longer than a file's can be
TOO_LONG = [
    *([command, NAME] for command in ("train", "status", "retry", "report")),
    ["validate", "one.yaml", f"model={NAME}"],
    ["validate", "one.yaml", f"task={{type: classification, dataset: {NAME}}}"],
]

Cli = Callable[..., tuple[int, str, str]]


def write(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def rankwise(*arguments: object, fresh: bool = False) -> subprocess.Popen[str]:
    """The command line in a process of its own, forked unless `fresh`."""
    return (subprocess.Popen if fresh else warm.Popen)(
        [sys.executable, "-m", "rankwise", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['rankwise', '--help']\n"
        "from rankwise.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    commands = "train compare status retry report validate schema params methods tasks papers archs env"
    for command in commands.split():
        assert f"  {command} " in done.stdout
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "peft", "datasets", "pandas", "numpy", "scipy", "pydantic", "rich"}


@pytest.mark.large
def test_no_library_advises_on_stderr_before_a_run() -> None:
    """bitsandbytes, which PEFT imports where it is there, would: what a faster path on CPUs needs."""
    given = ["model=random-bert", "task=stdlib-kind", "method=head", "max_steps=1", "max_length=8"]
    process = rankwise("train", *given, "--dry-run", fresh=True)
    _, err = process.communicate()
    assert process.returncode == 0 and err.startswith("dry run: ") and err.count("\n") == 1


def test_a_run_after_one_that_is_not_there_is_refused_before_it_has_a_folder(cli: Cli, tmp_path: Path) -> None:
    finish(Store(tmp_path), config(), 0.5)
    before = sorted(tmp_path.iterdir())
    given = {**TINY, "model": "random-bert", "method": "head", "after": "deadbeef0000", "runs": str(tmp_path)}
    code, out, err = cli("train", *(f"{key}={value}" for key, value in given.items()))
    assert (code, out, sorted(tmp_path.iterdir())) == (2, "", before)
    assert err.count("\n") == 1 and "the run that it begins with is not in" in err


def test_status_and_the_rest_of_the_runs_room_load_no_torch(tmp_path: Path) -> None:
    finish(Store(tmp_path), config(), 0.5)
    script = (
        "import sys; sys.argv = ['rankwise', 'status', sys.argv[1]]\n"
        "import rankwise.results.summary, rankwise.runs.grid, rankwise.report.html, rankwise.report.tables\n"
        "from rankwise.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "task=stdlib-kind", "epoch=3"], 'epoch: there is no such key (did you mean "epochs"?)'),
        (["train", "task=stdlib-kind", "epochs=three"], "epochs = 'three': expected number"),
        (["train", "task=stdlib-kin"], 'no such task (did you mean "stdlib-kind"?)'),
        (["train", "task=stdlib-kind", "method=simplexlora"], 'no such method (did you mean "simplex-lora"?)'),
        (["train", "task=stdlib-kind", "method.rnk=3"], 'method.rnk: lora has no such option (did you mean "rank"?)'),
        (["train", "task=stdlib-kind", "runs=FILE/runs"], "FILE/runs: cannot be written to: not a directory"),
        (["train", "missing.yaml"], "missing.yaml: there is no such file"),
        (["train", "two  spaces.yaml"], "two  spaces.yaml: there is no such file"),
        (["train", "broken.yaml"], "broken.yaml: line 2: not valid YAML"),
        (["train", "sweep.yaml"], "sweep.yaml: has `vary:`, so it is an experiment: rankwise compare sweep.yaml"),
        (["train", "."], "no run.yaml in it"),
        (["train", ".", "seed=1"], "seed=1: the settings of a run are in its run.yaml and stay as they are"),
        (["compare", "one.yaml"], "one.yaml: has no `vary:`, so it is one run: rankwise train one.yaml"),
        (["compare", "missing.yaml"], "missing.yaml: there is no such file"),
        (["compare", "sweep.yaml", "--runner", "ray2"], "--runner ray2: there is no such runner"),
        (["compare", "sweep.yaml", "runs=FILE/runs"], "FILE/runs: cannot be written to: not a directory"),
        (["validate", "one.yaml", "seed"], "'seed': expected key=value"),
        (
            ["train", "task=stdlib-kind", "method=full", "budget=9999"],
            "budget: full has no size to choose; leave it out",
        ),
        (["validate", "one.yaml", "method=bitfit", "budget=9999"], "budget: bitfit has no size to choose"),
        (["compare", "sweep.yaml", "method=head", "budget=9999"], "budget: none of the methods has a size to choose"),
        (
            ["train", "task=stdlib-kind", "tuning=0.2"],
            "tuning: only the runs of an experiment with `tune:` hold rows out",
        ),
        (["compare", "sweep.yaml", "tuning=0.2"], "tuning: no setting of an experiment"),
        (["compare", "sweep.yaml", "tune.learning_rate=[1e-3]", "task=ax"], "tune: ax has no score to choose"),
        (["status", "missing"], "missing: there is no such folder of runs"),
        (["retry", "missing"], "missing: there is no such folder of runs"),
        (["status", "BELOV"], 'BELOV: there is no such folder of runs (did you mean "BELOW"?)'),
        (["report", "."], ".: the runs are one folder further down, in BEGUN, BELOW; give BEGUN"),
        (["status", "BELOW/one"], "BELOW/one: is one run; give the folder above it"),
        (["status", "FILE"], "FILE: is a file; give the folder that holds the runs\n"),
        (["report", "EMPTY"], "EMPTY: there is no run in it\n"),
        (["report", "BEGUN"], "BEGUN: no run in it has finished; `rankwise status BEGUN` says how they stand\n"),
        (["report", ".", "--md", "--csv"], "choose one"),
        (["validate", "one.yaml", "seed=!!int x"], "seed: line 1: not valid YAML: 'x' cannot be read as int"),
        (["validate", "one.yaml", "model=" + "[" * 500], "model: line 1: not valid YAML: nested deeper than 50"),
        (["train", "seed=" + "1" * 5_000], "seed: line 1: not valid YAML: a number of 5,000 characters"),
        (["validate", "one.yaml", "model=&a [*a]"], "model: line 1: not valid YAML: an alias stands within"),
        (["validate", "one.yaml", "max_steps={2020-01-01: 1}"], "max_steps: the key datetime.date(2020, 1, 1) is no"),
        (["validate", "one.yaml", r'eval_rows="\ud800"'], r"eval_rows: '\ud800' holds a character that no text may"),
        (["compare", "sweep.yaml", "chain=[{after: x}, {followed: true}]"], "after: no setting of an experiment"),
        (["validate", "one.yaml", "epochs=1e308"], "epochs = 1e+308: expected less than or equal to 1000000"),
        (["train", "task=stdlib-kind", "batch_size=99999999999999999999"], "expected less than or equal to 2147483647"),
        (["train", "task=stdlib-kind", r'runs="a\0b"'], r"runs: 'a\x00b' holds a character that no text may have"),
        (["compare", "sweep.yaml", "-o", "jobs=!!int x"], "jobs: line 1: not valid YAML: 'x' cannot be read as int"),
        (["compare", "sweep.yaml", "-o", "jobs=99999999999999999999"], "jobs = 99999999999999999999: expected less"),
        (["params", "--arch", "minilm-l6", "--method", "lora", "rank=!!int x"], "rank: line 1: not valid YAML"),
        (["compare", "grid.yaml"], "grid.yaml: vary: more than 10,000 runs"),
        *((command, "ile name too long") for command in TOO_LONG),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_exits_with_2(
    arguments: list[str], message: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BEGUN" / "one").mkdir(parents=True)
    (tmp_path / "BEGUN" / "one" / "run.yaml").write_text("")
    (tmp_path / "BELOW" / "one").mkdir(parents=True)
    (tmp_path / "BELOW" / "one" / "run.yaml").write_text("")
    (tmp_path / "broken.yaml").write_text("task: [cola\n")
    write(tmp_path / "one.yaml", TINY)
    write(tmp_path / "sweep.yaml", {**TINY, "vary": {"seed": [0]}})
    write(tmp_path / "grid.yaml", {**TINY, "vary": {"seed": [*range(1_000)], "max_steps": [*range(1, 1_001)]}})
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("rankwise: ")
    assert err.count("\n") == 1


def test_a_warning_is_one_line_without_a_place_in_the_code(tmp_path: Path) -> None:
    folder = tmp_path / "xlnet"  # whose attention has weights that are in no layer
    with quiet():
        transformers.AutoModel.from_config(models.small_config("xlnet")).save_pretrained(folder)
    models.tokenizer("<pad>", pad_token="<pad>").save_pretrained(folder)
    settings = {**TINY, "model": str(folder), "max_steps": 1, "method": {"name": "lora", "rank": 2}}
    process = rankwise("train", write(tmp_path / "one.yaml", settings), f"runs={tmp_path / 'runs'}")
    err = process.communicate()[1]
    assert process.returncode == 0
    assert re.search(
        r"^warning: all-linear leaves out \d+% of the weights of XLNet\w+, which are in no layer that can be adapted",
        err,
        re.M,
    )
    assert ".py:" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rankwise", "status", "missing", "--debug"])
    with pytest.raises(ValueError, match="no such folder of runs"):
        main()


def test_an_unforeseen_error_is_one_line_and_exits_with_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "folders", lambda self: 1 / 0)
    code, out, err = cli("status", "somewhere")
    assert (code, out) == (1, "")
    assert err == "rankwise: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_a_wrong_usage_exits_with_2(cli: Cli) -> None:
    assert cli("train")[0] == 2
    assert cli("compare", "x.yaml", "--jobs", "0")[0] == 2
    assert cli("nothing")[0] == 2


@pytest.mark.parametrize(
    ("command", "full", "code"),
    [("methods", "stdout", 1), ("methods", "stderr", 0), ("train missing.yaml", "stderr", 2), ("typo", "stderr", 2)],
)
def test_output_that_cannot_be_written_changes_no_other_exit_code(command: str, full: str, code: int) -> None:
    with Path("/dev/full").open("wb") as disk:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: disk}
        done = warm.run([sys.executable, "-m", "rankwise", *command.split()], text=True, **streams)
    assert done.returncode == code, done.stderr
    if full == "stdout":
        assert done.stderr == "rankwise: OSError: [Errno 28] No space left on device (--debug shows where)\n"


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path / "sweep.yaml", {**TINY, "vary": {"method": ["lora", "head"], "seed": [0, 1]}})
    runs = tmp_path / "runs"
    code, out, err = cli("compare", file, f"runs={runs}", "--dry-run")
    assert code == 0
    assert err == f"4 runs in {runs}, 4 to carry out\n"
    assert len(out.splitlines()) == 6
    content = json.loads(cli("compare", file, f"runs={runs}", "--dry-run", "--json")[1])
    assert [each["state"] for each in content] == ["pending"] * 4
    code, out, err = cli("train", "task=stdlib-kind", "seed=4", f"runs={runs}", "--dry-run", "--json")
    assert json.loads(out)["seed"] == 4
    assert f"dry run: would be carried out in {runs}/stdlib-kind-lora-4-" in err
    assert not runs.exists()


def test_validate_prints_what_was_resolved(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("validate", write(tmp_path / "one.yaml", TINY), "method.rank=2")
    assert code == 0
    assert yaml.safe_load(out)["method"]["rank"] == 2
    assert err.endswith("one.yaml is valid: one run\n")
    sweep = write(tmp_path / "sweep.yaml", {**TINY, "vary": {"method": ["lora", "head"], "seed": [0, 1]}})
    assert cli("validate", sweep)[2].endswith("sweep.yaml is valid: an experiment of 4 runs\n")


def test_lists_are_there_for_people_and_machines(cli: Cli) -> None:
    assert "lora: " in cli("methods")[1]
    assert json.loads(cli("methods", "--json")[1])["lora"]["options"]["rank"] == 8
    assert "cola" in cli("tasks")[1]
    assert json.loads(cli("tasks", "--json")[1])["cola"]["score"] == "matthews"
    assert json.loads(cli("tasks", "--json")[1])["e2e"]["options"]["beams"] == 10
    assert "cola" in json.loads(cli("schema")[1])["properties"]["task"]["oneOf"][0]["enum"]
    found = json.loads(cli("env", "--json")[1])
    assert found["torch"]
    assert {"RANKWISE_DATA", "HF_HOME", "HF_HUB_OFFLINE", "device"} <= found.keys()
    assert "HF_HUB_OFFLINE: 1" in cli("env")[1]


def test_status_shows_each_run_and_the_error_of_a_failed_one(cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish(store, config(), 0.5)
    failed = store.create(config(seed=1), REVISION)
    (failed / "error.txt").write_text("no space left on device\n\nTraceback\n")
    store.create(config(seed=2), REVISION)
    code, out, err = cli("status", tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}: 3 runs, 1 pending, 1 failed, 1 done\n")
    assert any(line.startswith(failed.name) and "no space left on device" in line for line in out.splitlines())
    states = {each["run"]: each for each in json.loads(cli("status", tmp_path, "--json")[1])}
    assert states[failed.name] == {
        "run": failed.name,
        "learning_rate": 0.001,
        "state": "failed",
        "step": 0,
        "steps": None,
        "seconds_left": None,
        "tries": False,
        "planned": True,
        "settings": {"seed": 1},
        "error": "no space left on device",
    }


def test_report_of_several_folders_with_chosen_columns_for_a_paper(cli: Cli, tmp_path: Path) -> None:
    for name, method, score in (("a", config().method, 0.8), ("b", {"name": "head"}, 0.6)):
        for seed in (0, 1, 2):
            finish(Store(tmp_path / name), config(seed=seed, method=method), score + seed / 100)
    both = ("report", tmp_path / "a", tmp_path / "b")
    assert "training the head only is 0.200 behind lora rank=4" in cli(*both)[1]
    chosen = ("--columns", "method,accuracy, seeds", "--caption", "Ours", "--bold")
    assert cli(*both, "--latex", *chosen)[1].splitlines() == [
        *("\\begin{table}", "\\centering", "\\caption{Ours}", "\\begin{tabular}{lrr}", "\\toprule"),
        "method & accuracy (mean $\\pm$ sd) & seeds \\\\",
        *("\\midrule", "head & 0.610 $\\pm$ 0.010 & 3 \\\\"),
        "lora rank=4 & \\textbf{0.810 $\\pm$ 0.010} & 3 \\\\",
        *("\\bottomrule", "\\end{tabular}", "\\end{table}", ""),
    ]
    assert "| head | 0.610 ± 0.010 | 3 |\n| lora rank=4 | **0.810 ± 0.010** | 3 |" in cli(*both, "--md", *chosen)[1]
    assert cli(*both, "--csv", "--columns", "method,n")[1] == "method,n\nhead,3\nlora rank=4,3\n\n"
    code, out, err = cli(*both, "--html", tmp_path / "page.html")
    assert (code, out) == (0, "") and "Runs in a, b" in (tmp_path / "page.html").read_text()
    for wrong, said in (
        (("--columns", "method"), "--columns is for --md, --csv and --latex"),
        (("--csv", "--bold"), "--caption and --bold are for --md and --latex"),
        (("--md", "--columns", "rate"), "no column is called 'rate'"),
    ):
        code, _, err = cli(*both, *wrong)
        assert code == 2 and said in err and err.count("\n") == 1


def test_report_prints_one_table_or_writes_a_page(cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for seed in (0, 1, 2):
        finish(store, config(seed=seed), 0.8 + seed / 100)
        finish(store, config(seed=seed, method={"name": "head"}), 0.6)
    code, out, _ = cli("report", store.folder)
    assert code == 0
    assert "0.810 ± 0.010" in out
    assert "training the head only is 0.210 behind lora rank=4" in out
    assert json.loads(cli("report", store.folder, "--json")[1])["best"][1]["mean"] == pytest.approx(0.81)
    assert cli("report", store.folder, "--md")[1].startswith("| ")
    header = cli("report", store.folder, "--csv")[1].splitlines()[0].split(",")
    assert {"task", "method", "mean", "learning_rate"} <= set(header)
    assert r"\begin{" in cli("report", store.folder, "--latex")[1]
    page = tmp_path / "page.html"
    code, out, err = cli("report", store.folder, "--html", page)
    assert (code, out, err) == (0, "", f"report: {page}\n")
    assert "lora rank=4" in page.read_text()
    (tmp_path / "FILE").write_text("")
    code, _, err = cli("report", store.folder, "--html", tmp_path / "FILE" / "page.html")
    assert code == 2
    assert err.count("\n") == 1


def test_retry_with_nothing_failed_has_nothing_to_do(cli: Cli, tmp_path: Path) -> None:
    finish(Store(tmp_path), config(), 0.5)
    code, out, err = cli("retry", tmp_path, "--json")
    assert code == 0
    assert "no run has failed" in err
    assert json.loads(out)["done"] == []


def test_retry_leaves_a_rate_alone_at_which_training_diverges(cli: Cli, tmp_path: Path) -> None:
    """It is out of its contest, and would diverge again."""
    store = Store(tmp_path)
    tune(store, {1e-3: 0.5}, 1e-3)
    folder = store.create(config(learning_rate=5.0, tuning=0.1, seed=7), REVISION)
    store.note_error(folder, "loss is nan at step 1\n\nTraceback\n", diverged=True)
    code, out, err = cli("retry", tmp_path)
    assert code == 0 and "no run has failed" in err and "chosen" in out
    assert (folder / "error.txt").exists()
    states = {each["run"]: (each["state"], each["tries"]) for each in json.loads(cli("status", tmp_path, "--json")[1])}
    assert states[folder.name] == ("failed", True)
    assert sorted(states.values()) == [("done", False), ("done", False), ("done", True), ("failed", True)]


def test_a_run_that_tries_a_rate_says_so_when_trained_by_hand(cli: Cli, tmp_path: Path) -> None:
    store = Store(tmp_path)
    tune(store, {1e-3: 0.5}, 1e-3, task="stdlib-kind")  # whose data is always there
    (folder,) = (folder for folder in store.folders() if store.tries(folder))
    code, out, _ = cli("train", folder, "--reuse")
    assert code == 0
    assert "learning rate 0.001, tried for its experiment: accuracy 0.5 on 9 rows of train_held_out" in out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that leave results without training; what they are to carry out is checked elsewhere."""

    def carry_out(store: Store, folders: list[Path], runner: object, console: object = None) -> Outcome:
        for folder in folders:
            if store.state(folder) != "done":
                (folder / "result.json").write_text(json.dumps(result(folder, store.config(folder), 0.7)))
        return Outcome(done=list(folders))

    for room in ("compare", "plan", "tune"):
        monkeypatch.setattr(f"rankwise.sweep.{room}.carry_out", carry_out)
    monkeypatch.setattr("rankwise.cli.runs._page", lambda *_: None)


def made_by_others(store: Store, method: str, file: str) -> int:
    """Make it look as if a file of a method had changed after its runs; returns how many runs it has."""
    folders = [folder for folder in store.folders() if store.config(folder).method["name"] == method]
    for folder in folders:
        made = store.maker(folder)
        assert made is not None
        code = {each: dict(names) for each, names in made.parts().items()}
        code[file] = dict.fromkeys(code[file], "another")
        by = Maker.now(made.data, code)
        kept = run_file.load(folder)
        (folder / "run.yaml").write_text(replace(kept, maker=by).text())
        (folder / "maker.json").write_text(by.text())
    return len(folders)


def test_what_other_code_has_made_is_reused_or_repeated_as_the_user_says(cli: Cli, quick: None, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    file = write(tmp_path / "sweep.yaml", {**TINY, "vary": {"method": ["lora", "bitfit"], "seed": [0, 1]}})
    compare, store = ("compare", file, f"runs={runs}"), Store(runs)
    assert cli(*compare)[0] == 0 and cli(*compare)[0] == 0
    assert made_by_others(store, "lora", "methods/lora.py") == 2
    before = {folder: (folder / "result.json").read_bytes() for folder in store.folders()}
    found = "2 finished runs were made with other code: methods/lora.py differs"

    code, out, err = cli(*compare)
    assert (code, out, err) == (2, "", f"rankwise: {found}; --reuse keeps them, --repeat carries them out again\n")
    assert f"{found}; wants --reuse or --repeat\n" in cli(*compare, "--dry-run")[2]
    assert cli(*compare, "--reuse", "--repeat")[0] == 2
    one = next(folder for folder in before if "-lora-0-" in folder.name)
    assert cli("train", one)[2].startswith(
        "rankwise: 1 finished run was made with other code: methods/lora.py differs;"
    )
    assert cli("train", one, "--reuse")[0] == 0
    code, out, _ = cli(*compare, "--reuse")
    assert code == 0 and "lora rank=8" in out and "left out" not in out  # bitfit shares nothing that differs
    assert {folder: (folder / "result.json").read_bytes() for folder in store.folders()} == before

    code, out, _ = cli("compare", file, f"runs={runs}", "seed=[0,1,2]", "--reuse")
    assert code == 0 and "2 finished runs are left out, because newer ones were made with other code" in out
    assert "2 finished runs are left out" in cli("report", runs, "--md")[2]
    assert "2 finished runs are left out" in cli("status", runs)[1]
    cli("report", runs, "--html", tmp_path / "page.html")
    assert "2 finished runs are left out" in (tmp_path / "page.html").read_text()

    (one / "result.json").write_bytes(before[one] + b"\n")
    assert cli(*compare, "--repeat")[0] == 0
    assert (one / "result.json").read_bytes() == before[one] and cli(*compare)[0] == 0  # written again
    assert "left out" not in cli("report", runs)[1]


def test_a_page_that_cannot_be_made_takes_no_result_with_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(Store(tmp_path), config(), 0.5)
    monkeypatch.setattr("rankwise.report.html.write", lambda *_: 1 / 0)
    code, out, err = cli("retry", tmp_path, "--json")
    content = json.loads(out)
    assert (code, content["report"], content["best"][0]["mean"]) == (0, None, 0.5)
    assert "no report.html: division by zero" in err


@pytest.mark.large
def test_a_sweep_that_is_interrupted_and_then_killed_goes_on_with_the_same_command(cli: Cli, tmp_path: Path) -> None:
    """Ctrl-C stops the run in an orderly way; kill -9 leaves no worker; a bad run takes none with it."""
    runs = tmp_path / "runs"
    vary = {"learning_rate": [1e-3, 1e30], "seed": [0]}  # at which weights are soon infinite
    file = write(tmp_path / "sweep.yaml", {**TINY, "vary": vary, "report": {"title": "Tiny"}})
    command = ("compare", file, f"runs={runs}", "--jobs", "2", "--json")

    def good_one() -> Path | None:
        store = Store(runs)
        found = (path.parent for path in runs.glob("*/metrics.jsonl"))
        return next((folder for folder in found if store.config(folder).learning_rate < 1), None)

    def reached(step: int) -> bool:
        folder = good_one()
        return folder is not None and f'"step": {step},' in (folder / "metrics.jsonl").read_text()

    first = rankwise(*command)
    wait_for(lambda: reached(1))
    first.send_signal(signal.SIGINT)
    out, log = first.communicate(timeout=PATIENCE)
    assert (first.returncode, out) == (130, ""), log
    assert "Traceback" not in log
    assert not writers(runs)
    good = good_one()
    assert good is not None and Store(runs).state(good) == "stopped"
    assert list(good.glob("checkpoint-*"))

    stopped_at = Store(runs).standing(good).step
    second = rankwise(*command)
    wait_for(lambda: Store(runs).standing(good).step > stopped_at)
    assert writers(runs)
    second.kill()
    second.communicate()
    wait_for(lambda: not writers(runs))
    assert Store(runs).state(good) == "stopped"

    third = rankwise(*command)
    out, log = third.communicate(timeout=PATIENCE)
    assert third.returncode == 3, log
    assert "Traceback" not in log
    content = json.loads(out)
    assert content["done"] == [good.name]
    (failed,) = content["failed"]
    assert "loss is" in Store(runs).standing(runs / failed).error
    assert "Tiny" in Path(content["report"]).read_text()
    steps = [json.loads(line)["step"] for line in (good / "metrics.jsonl").read_text().splitlines()]
    assert (steps, steps[-1]) == (sorted(steps), TINY["max_steps"])

    # a finished run is printed and not carried out again
    before = (good / "result.json").read_bytes()
    code, out, _ = cli("train", good, "--json")
    assert (code, json.loads(out)) == (0, json.loads(before))
    code, out, _ = cli("train", good)
    assert "lora rank=8" in out
    assert (good / "result.json").read_bytes() == before

    # only the failed one is carried out again, and fails again
    again = rankwise("retry", runs, "--json")
    out, log = again.communicate(timeout=PATIENCE)
    assert (again.returncode, json.loads(out)["failed"], json.loads(out)["done"]) == (3, [failed], []), log
    assert "1 run failed and would again until what its error names is changed" in log.splitlines()[-1]
    assert (good / "result.json").read_bytes() == before
    assert (runs / failed / "log.txt").read_text().count("loss is") >= 2
    states = {each["run"]: each["state"] for each in json.loads(cli("status", runs, "--json")[1])}
    assert states == {good.name: "done", failed: "failed"}


def test_a_run_is_reproduced_from_the_file_that_lies_in_its_folder(cli: Cli, quick: None, tmp_path: Path) -> None:
    """And it is said what differs; the file may have been copied anywhere."""
    store, again = Store(tmp_path / "runs"), tmp_path / "again"
    cli("compare", write(tmp_path / "x.yaml", {**TINY, "vary": {"seed": [3]}}), f"runs={store.folder}")
    (folder,) = store.folders()
    code, out, err = cli("train", folder / "run.yaml", f"runs={again}", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["seed"] == 3
    assert f"would be carried out in {again / folder.name}" in err
    assert "run.yaml: was made with the present code and data" in err
    made_by_others(store, "lora", "methods/lora.py")
    assert "was made with other code: methods/lora.py differs" in cli("train", folder / "run.yaml", "--dry-run")[2]
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    copy = write(tmp_path / "copy.yaml", {**settings, "made_with": {"rankwise": "0.0.1", "data": "abc"}})
    words = "was made with other code and other data and another version of rankwise"
    assert f"copy.yaml: {words}" in cli("train", copy, "--dry-run")[2]
    assert cli("validate", copy)[0] == 0
    assert cli("train", write(copy, {**settings, "made_with": ["x"]}), "--dry-run")[0] == 2
    code, _, err = cli("train", write(copy, {**TINY, "id": "x"}), "--dry-run")
    assert code == 2 and "id: there is no such key" in err


@pytest.mark.large
def test_a_rate_is_not_chosen_among_what_two_codes_have_found(cli: Cli, quick: None, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    tuned = {**TINY, "tune": {"learning_rate": [1e-3, 1e-2]}, "vary": {"method": ["lora"], "seed": [0, 1]}}
    compare = ("compare", write(tmp_path / "sweep.yaml", tuned), f"runs={store.folder}")
    assert cli(*compare)[0] == 0 and cli(*compare)[0] == 0
    assert made_by_others(store, "lora", "methods/lora.py") == 4
    code, _, err = cli(*compare)
    assert code == 2 and "4 finished runs were made with other code: methods/lora.py differs" in err
    assert cli(*compare, "--reuse")[0] == 0  # the rate has been chosen
    tried = next(folder for folder in store.folders() if store.tries(folder))
    (tried / "result.json").unlink()
    code, _, err = cli(*compare, "--reuse")
    assert code == 2 and "1 finished run was made with other code" in err
    assert "the rest of their search needs the same; --repeat starts it again" in err
    assert cli(*compare, "--repeat")[0] == 0 and cli(*compare)[0] == 0


@pytest.mark.parametrize("rows", [{"train_rows": 1}, {"vary": {"method": ["lora"], "train_rows": [240, 1]}}])
def test_too_few_rows_to_choose_a_rate_by_are_refused_before_a_folder_is_made(
    rows: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    tuned = {**TINY, "tune": {"learning_rate": [1e-3, 1e-2]}, "vary": {"method": ["lora"], "seed": [0, 1]}, **rows}
    compare = ("compare", write(tmp_path / "sweep.yaml", tuned), f"runs={tmp_path / 'runs'}")
    for command in (compare, (*compare, "--dry-run")):
        code, out, err = cli(*command)
        assert (code, out) == (2, "") and "too few rows to hold some out" in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()
    code, _, err = cli(*compare, "tune.learning_rate=1e-3", "--dry-run")  # nothing to choose: no rows are held out
    assert code == 0, err


def test_what_is_refused_before_weights_are_read_is_refused_by_every_command(cli: Cli, tmp_path: Path) -> None:
    """In one line with the settings and their sum, before the run has a folder."""
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.csv").write_text("text,target\none,two\nthree,four\n")
    task = f"{{type: causal, dataset: {tmp_path / 'data'}, target_length: 64}}"
    short = str(tmp_path / "short")
    config = models.small_config("roberta", pad_token_id=56)  # "<pad>"; positions are counted from there
    config.max_position_embeddings = 56 + 1 + 38
    with quiet():
        transformers.AutoModel.from_config(config).save_pretrained(short)
    models.tokenizer("<pad>", pad_token="<pad>").save_pretrained(short)
    bare = str(tmp_path / "bare")
    config.save_pretrained(bare)
    models.tokenizer("<pad>", pad_token="<pad>").save_pretrained(bare)
    refused = {
        "max_length 500 + end token 1 + target_length 64 = 565: more than the 512": [task, "random-gpt2", 500, "lora"],
        "max_length 440 + prefix 8 + end token 1 + target_length 64 = 513: more than the 512": [
            task, "random-gpt2", 440, "{name: pre-embed, prefix: 8, infix: 0}",
        ],
        "max_length 39: more than the 38 tokens that Roberta": ["stdlib-kind", short, 39, "{name: lora, rank: 2}"],
        "has no weights: there is no file *.safetensors": ["stdlib-kind", bare, 30, "{name: lora, rank: 2}"],
    }  # fmt: skip
    runs = tmp_path / "runs"
    for words, (which, model, length, method) in refused.items():
        settings = [f"task={which}", f"model={model}", f"max_length={length}", f"method={method}", f"runs={runs}"]
        file = write(tmp_path / "one.yaml", {"seed": 0})
        for command in (["validate", file], ["train", file, "--dry-run"], ["train", file]):
            code, out, err = cli(*command, *settings)
            assert (code, out) == (2, "") and words in err and err.count("\n") == 1, (command, err)
    assert not runs.exists()


def test_code_that_comes_with_a_model_is_run_where_a_setting_says_so_and_nobody_is_asked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    with quiet():
        transformers.AutoModel.from_config(models.small_config("bert")).save_pretrained(folder)
    models.tokenizer("<pad>", pad_token="<pad>").save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "own-kind", "auto_map": classes}))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(BertConfig):\n"
        "    model_type = 'own-kind'\n"
        "class OwnModel(BertForSequenceClassification):\n"
        "    config_class = OwnConfig\n"
    )
    settings = ["task=stdlib-kind", f"model={folder}", "max_length=30", "method.rank=2", f"runs={tmp_path / 'runs'}"]
    file = write(tmp_path / "one.yaml", {"seed": 0})
    for command in (["validate", file], ["train", file, "--dry-run"], ["train", file]):
        code, out, err = cli(*command, *settings)
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert "its own code, which is not run" in err and "set trust_remote_code: true" in err
    assert not ran.exists() and not (tmp_path / "runs").exists()
    code, out, err = cli("train", file, *settings, "trust_remote_code=true", "--dry-run", "--json")
    assert code == 0 and ran.exists(), err
    assert json.loads(out)["trust_remote_code"] is True
    model, _, head = build(str(folder), tasks.build("stdlib-kind"), 30, loading=Loading(trust_remote_code=True))
    assert type(model).__name__ == "OwnModel" and head == ["classifier"]
