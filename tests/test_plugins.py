"""Methods and tasks from outside: files that a configuration names, and modules of installed packages."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import rankwise as rw
import warm
from asserts import refused
from rankwise.errors import InputError
from rankwise.methods import Method
from rankwise.metrics import METRICS
from rankwise.named import load_plugin
from rankwise.runs import run_file
from rankwise.runs.code import code_of
from rankwise.runs.store import Store
from rankwise.settings import Schema, load
from rankwise.tasks import Task
from runs import bert

pytestmark = pytest.mark.usefixtures("guests")

Cli = Callable[..., tuple[int, str, str]]

PLUGIN = '''
"""A method and a task."""

from dataclasses import dataclass
from typing import Annotated

from datasets import Dataset
from pydantic import Field

from rankwise.methods.lora import LoRA
from rankwise.tasks.base import Split
from rankwise.tasks.classification import Classification


@dataclass(frozen=True)
class Mine(LoRA, name="{name}"):
    """LoRA of my own."""

    twist: Annotated[float, Field(ge=0)] = {twist}


class Parity(Classification, name="parity-{name}"):
    """Is the number even?"""

    text = ("line",)
    labels = ("even", "odd")
    main = "accuracy"
    metrics = ("accuracy",)

    def train(self) -> Split:
        return self._split("train", range(60))

    def evaluation(self) -> list[Split]:
        return [self._split("validation", range(60, 90))]

    def _split(self, name, numbers):
        columns = {{"line": [str(n) for n in numbers], "label": [n % 2 for n in numbers], "idx": list(numbers)}}
        return Split(name, Dataset.from_dict(columns), official=False, note="made up")
'''


METRIC = '''
"""A metric, of which less is better: how far the predicted class is from the true one."""

import numpy as np

from rankwise.metrics import Metric, add
from rankwise.metrics.metric import FROM_ZERO, mean_of_sums, pair


def distance(predictions, labels):
    predicted, true = pair(predictions, labels)
    return np.stack([np.abs(predicted - true), np.ones_like(true)], axis=1).astype(float)


add("{name}", Metric(FROM_ZERO, mean_of_sums, distance, least_is_best=True), of="classes")
'''


def write(file: Path, name: str = "mine", twist: float = 0.5) -> Path:
    file.write_text(PLUGIN.format(name=name, twist=twist))
    return file


def schema() -> Schema:
    return Schema(Method.registry(), Task.registry())


def settings(file: Path, folder: Path) -> dict[str, object]:
    """An experiment that tunes the plugin's method, at a budget, on the plugin's task."""
    return {
        "task": "parity-mine",
        "model": bert(folder / "base"),
        "plugins": [str(file)],
        "max_steps": 2,
        "max_length": 8,
        "batch_size": 4,
        "budget": 2_000,
        "runs": str(folder / "runs"),
        "vary": {"seed": [0, 1], "method": [{"name": "mine", "targets": ["query", "value"]}]},
        "tune": {"learning_rate": [1e-3, 1e-2]},
    }


def rankwise(folder: Path, *arguments: object, **environment: str) -> tuple[int, str, str]:
    done = warm.run(
        [sys.executable, "-m", "rankwise", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.large
def test_a_plugins_method_is_tuned_and_reported_as_ours_are(tmp_path: Path) -> None:
    """In the processes of the runs, which are in other folders; when its file moves, its runs go on."""
    file = write(tmp_path / "plug.py")
    content = {**settings(file, tmp_path), "plugins": ["plug.py"]}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    code, out, err = rankwise(tmp_path, "compare", "experiment.yaml", "--json")
    assert code == 0, err
    assert len(json.loads(out)["done"]) == 4
    store = Store(tmp_path / "runs")
    for folder in store.folders():
        kept = run_file.load(folder)
        assert kept.config.plugins == [str(file)]
        assert kept.config.method["twist"] == 0.5 and kept.config.method["rank"] > 0
        assert kept.maker is not None and "plug.py" in kept.maker.parts()

    moved = tmp_path / "moved"
    moved.mkdir()
    file.rename(moved / "plug.py")
    newest = store.folders()[-1]
    (newest / "result.json").unlink()
    code, _, err = rankwise(tmp_path, "train", newest)
    assert code == 2 and f"{file} is no file" in err
    code, out, err = rankwise(moved, "compare", "../experiment.yaml", "--json")
    assert code == 0 and len(json.loads(out)["done"]) == 4, err
    assert run_file.load(newest).config.plugins == [str(moved / "plug.py")]


@pytest.mark.large
def test_a_run_of_a_changed_plugin_is_one_of_other_code(tmp_path: Path) -> None:
    file = write(tmp_path / "plug.py")
    given = {**settings(file, tmp_path), "tune": None, "learning_rate": 1e-3}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({key: each for key, each in given.items() if each}))
    assert rankwise(tmp_path, "compare", "experiment.yaml")[0] == 0
    write(file, twist=0.25)
    code, _, err = rankwise(tmp_path, "compare", "experiment.yaml")
    assert code == 2 and "2 finished runs were made with other code: plug.py differs" in err


@pytest.mark.large
def test_a_plugins_metric_decides_in_its_direction_and_its_code_counts(tmp_path: Path) -> None:
    """Also for a report in a new process; if the plugin is gone, there is no report without it."""
    file = tmp_path / "metric_file.py"
    file.write_text(METRIC.format(name="distance"))
    rows = "".join(f"text {number},{number % 3}\n" for number in range(60))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    task = {"type": "classification", "dataset": str(tmp_path / "rows.csv"), "metrics": ["distance", "accuracy"]}
    methods = [{"name": name, "learning_rate": [1e-4, 1e-1]} for name in ("lora", "head")]
    given = {**settings(file, tmp_path), "task": task, "vary": {"seed": [0, 1], "method": methods}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({**given, "tune": None, "budget": None}))
    code, out, err = rankwise(tmp_path, "compare", "experiment.yaml")
    assert code == 0 and "distance (lower is better)" in out, err
    assert any(
        "metric_file.py" in made.parts()
        for made in map(Store(tmp_path / "runs").maker, Store(tmp_path / "runs").folders())
        if made
    )
    code, out, err = rankwise(tmp_path, "report", "runs", "--json")
    assert code == 0, err
    content = json.loads(out)
    for best in content["best"]:
        means = [row["mean"] for row in content["rows"] if row["name"] == best["name"]]
        assert best["mean"] == min(means)
    assert content["differences"][0]["examples"] is not None  # the paired bootstrap knows the metric
    file.write_text(file.read_text().replace("np.abs(predicted - true)", "(predicted - true) ** 2"))
    code, _, err = rankwise(tmp_path, "compare", "experiment.yaml")
    assert code == 2 and "metric_file.py differs" in err
    file.unlink()
    code, out, err = rankwise(tmp_path, "report", "runs")
    assert (code, out, err.count("\n")) == (2, "", 1) and "its score is distance, of a plugin" in err


@pytest.mark.parametrize(("name", "message"), [("accuracy", "two metrics are called 'accuracy'")])
def test_a_metric_of_a_known_name_is_refused(name: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "twice.py"
    file.write_text(METRIC.format(name=name))
    with pytest.raises(InputError, match=message):
        load_plugin(file)


def test_the_metric_of_the_page_is_taken_by_the_schema_and_by_tasks(tmp_path: Path, cli: Cli) -> None:
    page = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
    file = tmp_path / "distance.py"
    file.write_text(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0])
    code, out, _ = cli("schema", file)
    assert code == 0 and out.count('"distance"') == 2  # of a class, and of a pair
    task = Task.build({"name": "classification", "dataset": "rows.csv", "metrics": ("distance",)})
    assert task.main == "distance" and METRICS["distance"]([0, 2, 1], [0, 0, 0]) == 1.0
    assert "no metric of regression" in refused(
        lambda: Task.build({"name": "regression", "dataset": "rows.csv", "metrics": ("distance",)})
    )


def test_the_path_of_a_plugin_is_not_in_an_id(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    given = {"task": "parity-mine", "method": "mine"}
    one = load({**given, "plugins": [str(write(tmp_path / "plug.py"))]}, [], schema())
    other = one.model_copy(update={"plugins": [str(tmp_path / "there" / "plug.py")]})  # type: ignore[union-attr]
    assert one.id == other.id  # type: ignore[union-attr]


def test_the_options_of_a_plugin_can_be_given_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    file = write(tmp_path / "plug.py")
    (tmp_path / "one.yaml").write_text("task: parity-mine\nplugins: [missing.py]\n")
    code, out, err = cli("validate", tmp_path / "one.yaml", f"plugins=[{file}]", "method=mine", "method.twist=2")
    assert code == 0 and "twist: 2.0" in out, err
    code, out, err = cli("validate", tmp_path / "one.yaml", f"plugins=[{file}]", "method=mine", "method.twist=-1")
    assert code == 2 and "twist must not be negative" in err
    code, out, _ = cli("params", "--arch", "minilm-l6", "--method", "mine", f"plugins=[{file}]", "rank=2", "--json")
    assert code == 0 and json.loads(out)["trainable"] > 0
    code, out, _ = cli("schema", file)
    assert code == 0 and '"twist"' in out and '"parity-mine"' in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"plugins: .*plug_\w+\.py is no file: name the Python file of the plugin"),
        ("import no_such_module", r"cannot be loaded: ModuleNotFoundError in line 1: No module named 'no_such_module'"),
        ("x = 1\nx.y", r"cannot be loaded: AttributeError in line 2"),
        ("def", r"cannot be loaded: SyntaxError: "),
        ("import sys; sys.exit(3)", r"cannot be loaded: SystemExit in line 1: 3"),
        (PLUGIN.format(name="lora", twist=1), r"cannot be loaded: TypeError.*two methods are called 'lora'"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / f"plug_{abs(hash(text)):x}.py"
    if text:
        file.write_text(text)
    said = refused(lambda: load({"task": "cola", "plugins": [str(file)]}, [], schema()))
    assert re.search(message, said), said


@pytest.mark.parametrize("value", ["plug.py", [1], {"a": 1}, None])
def test_plugins_are_a_list_of_files(value: object) -> None:
    said = refused(lambda: load({"task": "cola", "plugins": value}, [], schema()))
    assert said.startswith("plugins = ") and said.endswith("as in `plugins: [my.py]`")


def test_plugins_are_no_axis() -> None:
    for given in ({"vary": {"plugins": [["a.py"]]}}, {"vary": {"seed": [0]}, "chain": [{"plugins": []}]}):
        assert "plugins" in refused(lambda given=given: load({"task": "cola", **given}, [], schema()))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["torch", "rankwise", "json", "my.method"])
def test_a_plugin_does_not_take_the_place_of_another_module(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another module has that name: rename the file"):
        load_plugin(write(tmp_path / f"{name}.py"))


def test_a_plugin_that_fails_leaves_nothing_and_can_be_mended(tmp_path: Path) -> None:
    file = write(tmp_path / "half.py", "half")
    whole = file.read_text()
    file.write_text(whole + "\n1 / 0\n")
    with pytest.raises(InputError, match=r"half\.py cannot be loaded: ZeroDivisionError in line \d+"):
        load_plugin(file)
    assert "half" not in Method.registry() and "lora" in Method.registry()
    file.write_text(whole)
    load_plugin(file)
    assert "half" in Method.registry()


def test_a_plugin_is_loaded_once_and_its_later_edits_are_refused(tmp_path: Path) -> None:
    """The code that made a run is read from the file, and must be that which ran."""
    file = write(tmp_path / "once.py", "once")
    assert load_plugin(file) == load_plugin(str(file)) == file
    write(file, "once", twist=3)
    with pytest.raises(InputError, match="has changed since it was loaded: restart Python"):
        load_plugin(file)


def test_a_plugin_imports_a_file_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "next_to_it.py").write_text("TWIST = 7.0\n")
    file = write(tmp_path / "importing.py", "importing")
    file.write_text("from next_to_it import TWIST\n" + file.read_text().replace("= 0.5", "= TWIST"))
    load_plugin(file)
    assert Method.build("importing").twist == 7.0  # type: ignore[attr-defined]


def folder_with_helpers(folder: Path, name: str, factor: float = 2.0) -> Path:
    """A plugin that imports a file and a package next to it."""
    (folder / "helpers").mkdir(parents=True)
    (folder / "helpers" / "__init__.py").write_text("from . import deep\n")
    (folder / "helpers" / "deep.py").write_text(f"FACTOR = {factor}\ndef twice(x):\n    return FACTOR * x\n")
    file = write(folder / f"{name}_helped.py", name)
    body = "\n    def budget(self, model):\n        return int(helpers.deep.twice(super().budget(model)))\n"
    file.write_text("import helpers.deep\n" + file.read_text().replace(" = 0.5\n", f" = 0.5\n{body}"))
    return file


def test_what_a_plugin_imports_from_a_package_next_to_it_counts_as_its_code(tmp_path: Path) -> None:
    file = folder_with_helpers(tmp_path / "one füür", "counted")
    load_plugin(file)
    before = code_of(Method.registry()["counted"])
    assert {"counted_helped.py", "deep.py"} <= before.keys()
    with pytest.raises(InputError, match=r"deep\.py has changed since it was loaded: restart Python"):
        (file.parent / "helpers" / "deep.py").write_text("FACTOR = 3.0\ndef twice(x):\n    return FACTOR * x\n")
        load_plugin(file)


def test_two_plugins_do_not_take_each_others_helpers(tmp_path: Path) -> None:
    load_plugin(folder_with_helpers(tmp_path / "a", "first"))
    with pytest.raises(InputError, match=r"imports 'helpers.*', and another module has that name: rename .*b/helpers"):
        load_plugin(folder_with_helpers(tmp_path / "b", "second", 3.0))
    assert "second" not in Method.registry()


def test_one_file_by_two_paths_is_one_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "twice_named.py", "twice-named")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert load_plugin("../twice_named.py") == load_plugin(file) == file


@pytest.mark.large
def test_a_method_of_a_notebook_counts_by_what_it_does_and_its_cell_can_be_run_again(tmp_path: Path) -> None:
    """There is no file to read; the digest is the same in every process."""
    cell = """
from dataclasses import dataclass
from functools import cache
from rankwise.methods.lora import LoRA
from rankwise.runs.code import code_of

LOUD, NAMES = {loud}, {{"x", "y", {name!r}}}
@cache
def more():
    return {more}
def louder(x):
    return LOUD * x * more()

@dataclass(frozen=True)
class Mine(LoRA, name="mine"):
    "{words}"
    often: int = {often}
    def before_step(self, model):
        for p in model.parameters():
            if p.requires_grad and "x" in {{"x", "y", "z"}} and "x" in NAMES:
                p.grad = louder(p.grad)
print(code_of(Mine)["__main__"]["Mine"])
"""
    usual = {"loud": 1.0, "often": 1, "words": "A.", "name": "z", "more": 1}
    changes: list[dict[str, object]] = [{}, {"loud": 2.0}, {"often": 2}, {"name": "w"}, {"more": 2}, {}]
    cells = [cell.format(**{**usual, **change}) for change in changes]
    digests = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", "for cell in open(0).read().split('====='): exec(cell)"],
            input="=====".join(cells),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.split())
    first, *others, again = digests[0]
    assert digests[0] == digests[1] and first == again and len({first, *others}) == len(changes) - 1


def test_what_a_plugin_prints_is_not_in_the_result(tmp_path: Path, cli: Cli) -> None:
    file = write(tmp_path / "printing.py", "printing")
    file.write_text(file.read_text() + "\nprint('loaded')\n")
    code, out, err = cli("validate", "experiments/quickstart.yaml", f"plugins=[{file}]", "--json")
    assert code == 0 and json.loads(out) and "loaded" in err


def test_a_method_that_the_runs_processes_would_not_find_is_refused(tmp_path: Path) -> None:
    """As when it is defined in a notebook, or its plugin is not named in this experiment."""
    file = write(tmp_path / "unnamed.py", "unnamed")
    load_plugin(file)
    given = {"task": "stdlib-kind", "vary": {"seed": [0], "method": ["unnamed"]}, "runs": str(tmp_path / "runs")}
    said = refused(lambda: rw.compare(given))
    assert said.startswith("method unnamed is defined in unnamed, which the processes of the runs do not load: name")
    assert not (tmp_path / "runs").exists()


@pytest.mark.large
def test_plugins_of_installed_packages_are_there_without_being_named(tmp_path: Path) -> None:
    """Listed, in the schema, and in the process of each run."""
    write(tmp_path / "installed_methods.py", "installed")
    about = tmp_path / "installed_methods-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-methods\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rankwise]\nmine = installed_methods\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, out, err = rankwise(tmp_path, "methods", "--json", PYTHONPATH=path)
    assert code == 0, err
    assert json.loads(out)["installed"] == {
        "summary": "LoRA of my own.",
        "options": {**json.loads(out)["lora"]["options"], "twist": 0.5},
    }
    code, out, _ = rankwise(tmp_path, "tasks", "--json", PYTHONPATH=path)
    assert code == 0 and json.loads(out)["parity-installed"]["summary"] == "Is the number even?"
    content = {**settings(Path("none.py"), tmp_path), "task": "parity-installed"}
    content |= {"vary": {"seed": [0], "method": ["installed"]}, "tune": None, "plugins": [], "learning_rate": 1e-3}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({key: each for key, each in content.items() if each}))
    code, out, err = rankwise(tmp_path, "compare", "experiment.yaml", "--json", PYTHONPATH=path)
    assert code == 0 and len(json.loads(out)["done"]) == 1, err
    (tmp_path / "installed_methods.py").write_text("1 / 0\n")
    code, _, err = rankwise(tmp_path, "methods", PYTHONPATH=path)
    assert code == 2 and err.count("\n") == 1
    assert "installed_methods, a plugin of the package installed-methods, cannot be loaded: ZeroDivisionError" in err
