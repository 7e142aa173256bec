"""What counts as the code that made a run: everything that it needs, and nothing that only looks different."""

import ast
import functools
import importlib.util
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import rankwise
from rankwise import methods, tasks
from rankwise.runs.code import ASIDE, Code, code_at, code_of, differing, digest
from rankwise.train.run import run
from runs import SIMPLEX, make

SOURCE = Path(rankwise.__file__).parent
ENGINE = ("rankwise.train.run", "run")
TASK = ("rankwise.tasks.stdlib_docs", "StdlibKind")
BITFIT = ("rankwise.methods.subset", "BitFit")
SIMPLEX_LORA = ("rankwise.methods.simplex_lora", "SimplexLoRA")

Copy = Callable[[], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Make a copy of the package's source, to be edited."""
    numbers = itertools.count()
    return lambda: Path(
        shutil.copytree(
            SOURCE, tmp_path / f"{next(numbers)}" / "rankwise", ignore=lambda _, names: set(names) - source(names)
        )
    )


def source(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".py") or ("." not in name and name != "__pycache__")}


def made_by(package: Path, method: tuple[str, str] = SIMPLEX_LORA) -> Code:
    return code_at(package, ENGINE, method, TASK)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def reworded(text: str) -> str:
    """The same program with other docstrings and errors, without comments and in another form."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant("Other words."))
        for each in ast.walk(node) if isinstance(node, ast.Raise) else ():
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                each.value = "other words"
    return f"# A comment.\n{ast.unparse(tree)}\n"


def test_to_reword_every_file_changes_nothing(copy: Copy) -> None:
    package = copy()
    for file in package.rglob("*.py"):
        file.write_text(reworded(file.read_text()))
    assert made_by(package) == made_by(SOURCE)
    assert digest(made_by(package)) == digest(made_by(SOURCE))


def test_to_move_a_file_changes_nothing(copy: Copy) -> None:
    """A method into a room of its own, and a module that many call by its name under another one."""
    package = copy()
    (package / "searches").mkdir()
    (package / "searches" / "__init__.py").touch()
    (package / "methods" / "simplex_lora.py").rename(package / "searches" / "found.py")
    (package / "train" / "model.py").rename(package / "train" / "loading.py")
    for file in package.rglob("*.py"):
        text = file.read_text().replace("rankwise.train.model", "rankwise.train.loading")
        text = text.replace("from rankwise.train import model as models", "from rankwise.train import loading")
        file.write_text(text.replace("models.", "loading.") if "import loading" in text else text)
    moved = made_by(package, ("rankwise.searches.found", "SimplexLoRA"))
    assert "searches/found.py" in moved and "train/loading.py" in moved
    assert digest(moved) == digest(made_by(SOURCE))
    assert differing(moved, made_by(SOURCE)) == []


def test_to_move_a_definition_changes_nothing(copy: Copy) -> None:
    """With the detail that it needs; who used it finds it by an import, or through the room that it is of."""
    package = copy()
    file = package / "optim" / "project.py"
    tree = ast.parse(file.read_text())
    (moved,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "simplex")
    tree.body.remove(moved)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    file.with_name("corner.py").write_text(ast.unparse(ast.Module([*imports, moved], [])))
    file.write_text(f"from rankwise.optim.corner import simplex\n{ast.unparse(tree)}")
    found = made_by(package)
    assert "simplex" in found["optim/corner.py"]
    assert differing(found, made_by(SOURCE)) == []


def test_a_change_is_one_of_the_runs_that_use_it(copy: Copy) -> None:
    package = copy()
    edit(
        package / "methods" / "simplex_lora.py",
        "every: Annotated[int, Field(ge=1)] = ",
        "every: Annotated[int, Field(ge=1)] = 1",
    )
    assert differing(made_by(package), made_by(SOURCE)) == ["methods/simplex_lora.py"]
    assert made_by(package, BITFIT) == made_by(SOURCE, BITFIT)
    assert differing(made_by(package), made_by(SOURCE, BITFIT), shared=True) == []
    assert differing(made_by(SOURCE, BITFIT), made_by(SOURCE)) != []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("train/arguments.py", "weight_decay=config.weight_decay", "weight_decay=0"),
        ("optim/project.py", "def simplex(", "def simplex(  # a comment counts for nothing\n    *, "),
        ("ranks/allocate.py", "def allocate(", "def allocate(new=1, *, "),
        ("tasks/stdlib_docs.py", "class StdlibKind(", "LEAST = 9\n\n\nclass StdlibKind("),
        ("metrics/classification.py", "def right(", "def right(new=1, *, "),
    ],
)
def test_a_change_in_what_runs_share_is_one_of_them_all(file: str, old: str, new: str, copy: Copy) -> None:
    package = copy()
    edit(package / file, old, new)
    unused = file.startswith("tasks")  # no code reads the new constant
    for method in (SIMPLEX_LORA, BITFIT):
        if file.startswith(("ranks/allocate", "optim/project")) and method is BITFIT:
            continue
        assert differing(made_by(package, method), made_by(SOURCE, method)) == ([] if unused else [file])


@pytest.mark.large
def test_runs_of_one_code_never_disagree() -> None:
    """Names that two files share would look like one definition that has changed."""
    kinds = [*methods.registry().values(), *tasks.registry().values()]
    for one, other in itertools.combinations([code_of(run, kind) for kind in kinds], 2):
        assert differing(one, other, shared=True) == []


def test_what_decides_no_result_is_left_out(copy: Copy) -> None:
    package = copy()
    assert all((SOURCE / room).is_dir() or (SOURCE / f"{room}.py").is_file() for room in ASIDE)
    for room in sorted(ASIDE):
        for file in [package / f"{room}.py", *(package / room).glob("*.py")]:
            if file.exists():
                file.write_text(f"{file.read_text()}\n\ndef more():\n    return 1\n")
    edit(package / "settings" / "run.py", "class RunConfig(BaseModel):", "class RunConfig(BaseModel):\n    more = 1\n")
    assert made_by(package) == made_by(SOURCE)
    rooms = {file.partition("/")[0] for file in made_by(SOURCE)}
    assert rooms >= {"methods", "tasks", "ranks", "optim", "train", "metrics"} and not rooms & ASIDE


@functools.cache
def rooms_of(file: str) -> frozenset[str]:
    """A file's folder and the file itself, as ASIDE names them; none for files of others."""
    path = Path(file)
    parts = path.relative_to(SOURCE).with_suffix("").parts if path.is_relative_to(SOURCE) else ()
    return frozenset({*parts[:1], *(["/".join(parts)] if parts else [])})


def rooms(frame: FrameType | None) -> set[str]:
    """The rooms that a call has come through."""
    found = set[str]()
    while frame is not None:
        found |= rooms_of(frame.f_code.co_filename)
        frame = frame.f_back
    return found


@pytest.mark.large
def test_all_that_a_run_carries_out_is_in_its_code(tmp_path: Path) -> None:
    folder, called = (
        make(tmp_path / "run", method=SIMPLEX, max_steps=4, train_rows=32, eval_rows=8),
        set[tuple[str, str]](),
    )

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        outer = code.co_flags & inspect.CO_OPTIMIZED and "<locals>" not in code.co_qualname  # no body of a class
        ours = event == "call" and outer and rooms_of(code.co_filename)
        if ours and ASIDE.isdisjoint(rooms(frame)):  # what only saves uses the engine, too
            called.add((code.co_filename, code.co_qualname.partition(".")[0]))

    sys.setprofile(note)
    try:
        run(folder)
    finally:
        sys.setprofile(None)
    found = code_of(run, methods.registry()["simplex-lora"], tasks.registry()["stdlib-kind"])
    names = {str(Path(file).relative_to(SOURCE)): set[str]() for file, _ in called}
    for file, name in called:
        if not name.startswith(("_", "<")):  # details are in those that use them
            names[str(Path(file).relative_to(SOURCE))].add(name)
    missed = {file: left for file, each in names.items() if (left := each - found.get(file, {}).keys())}
    assert missed == {}
    assert len(called) > 50


PLUGIN = """
from rankwise.methods.lora import LoRA
from {beside} import FACTOR

class Mine(LoRA):
    def budget(self, model):
        return FACTOR * super().budget(model)
"""


def test_a_plugin_counts_with_the_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for name, factor, more in (("one", 2, ""), ("two", 2, "# a comment\n"), ("three", 3, "")):
        (tmp_path / f"factor_{name}.py").write_text(f"FACTOR = {factor}\n")
        (tmp_path / f"plugin_{name}.py").write_text(more + PLUGIN.format(beside=f"factor_{name}"))
        spec = importlib.util.find_spec(f"plugin_{name}")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        found.append(code_of(run, module.Mine))
    assert {"plugin_one.py", "methods/lora.py"} <= found[0].keys()
    assert digest(found[0]) == digest(found[1]) != digest(found[2])


def test_a_class_made_in_a_function_counts_with_its_file() -> None:
    class Local(methods.registry()["lora"]):  # type: ignore[misc]
        pass

    assert {"test_code.py", "methods/lora.py"} <= code_of(run, Local).keys()
