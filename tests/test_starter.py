"""The file that an experiment of one's own starts from."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankwise import methods, tasks
from rankwise.settings import Experiment, Schema, load, parse_yaml
from rankwise.starter import TYPES

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with all columns that any type needs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    with Path("my tickets.csv").open("w", newline="") as file:
        rows = ([f"ticket {n} is open", f"answer {n}", "ab"[n % 2], n / 7] for n in range(120))
        csv.writer(file).writerows([["body", "reply", "kind", "price"], *rows])
    return "my tickets.csv"


def terminal(monkeypatch: pytest.MonkeyPatch, answers: str, there: bool = True) -> None:
    typed = io.StringIO(answers)
    typed.isatty = lambda: there  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", typed)


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_written_from_flags_is_a_valid_experiment(kind: str, data: str, cli: Cli) -> None:
    text = "body,reply" if kind == "pair" else "body"
    label = {"label": "kind", "target": "reply"}[TYPES[kind]] if kind != "regression" else "price"
    flags = ["--data", data, "--type", kind, "--text", text, "--label", label]
    code, out, err = cli("init", "my.yaml", *flags, "--model", "random-bert")
    assert (code, out, err) == (0, "", "wrote my.yaml; next: rankwise validate my.yaml\n")
    found = load("my.yaml", [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(found, Experiment) and found.tune is not None and found.vary["seed"] == [0, 1, 2]
    assert found.base["task"]["dataset"] == data and found.base["model"] == "random-bert"
    assert list(found.base["task"]["columns"].values()) == [*text.split(","), label]
    metrics = [line.partition("# ")[2] for line in Path("my.yaml").read_text().splitlines() if "# metrics:" in line]
    assert len(metrics) == (kind in ("classification", "pair", "regression"))
    for line in metrics:
        named = {**found.base["task"], **parse_yaml(line)}
        assert load({**found.base, "task": named}, [], Schema(methods.registry(), tasks.registry()))
    assert all("#" in line or not line.strip() for line in Path("my.yaml").read_text().splitlines()[:5])


def test_the_plan_of_such_a_file_can_be_seen_at_once(data: str, cli: Cli) -> None:
    cli("init", "--data", data, "--type", "classification", "--text", "body", "--label", "kind")
    planned = json.loads(cli("compare", "experiment.yaml", "model=random-bert", "--dry-run", "--json")[1])
    assert len(planned) == 9  # three rates for each of three methods; what is reported follows


def test_four_questions_are_asked_and_have_usual_answers(data: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch, f"{data}\n\n\nkind\n")
    code, _, err = cli("init")
    assert code == 0 and err.count("?") == 3 and "Your data" in err
    assert "Read which column of body, reply, kind, price? [body]" in err
    text = Path("experiment.yaml").read_text()
    assert "columns: {text: body, label: kind}" in text and "type: classification" in text
    assert "dataset: my tickets.csv" in text and "name: head" in text and "# model: roberta-base" in text


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("instruct", {"prompt": "a", "completion": "b"}),
        ("instruct", {"instruction": "a", "input": "", "output": "b"}),
        ("text", {"text": "a"}),
    ],
)
def test_a_file_for_conversations_needs_no_columns(
    kind: str, row: dict[str, object], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps(row).replace('"a"', f'"a {n}"') + "\n" for n in range(60)))
    terminal(monkeypatch, "a.jsonl\n" + (f"{kind}\n" if kind == "text" else "\n"))
    code, _, err = cli("init", "my.yaml")
    assert code == 0 and f"[{'classification' if kind == 'text' else kind}]" in err and "column" not in err
    found = load("my.yaml", [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(found, Experiment) and found.base["task"]["name"] == kind and found.base["model"] == "smollm2"
    assert tasks.build(found.base["task"])
    planned = json.loads(cli("compare", "my.yaml", "model=random-llama", "--dry-run", "--json")[1])
    assert len(planned) == 9  # three rates for each of two methods, and three seeds of the model as it comes


def images(folder: Path) -> str:
    for split, rows in (("train", 30), ("validation", 4)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
            for row in range(rows):
                pixels = np.full((8, 8), row % 2, np.uint8)
                Image.fromarray(pixels * 90 if part == "images" else pixels).save(folder / split / part / f"{row}.png")
    return str(folder)


@pytest.mark.parametrize("model", ["", "unet", "unet-refined"])
def test_what_is_written_for_images_and_masks_is_valid(
    model: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    terminal(monkeypatch, f"{images(tmp_path / 'cells')}\n\nnothing, cell\n")
    code, _, err = cli("init", "my.yaml", *(["--model", model] if model else []))
    assert code == 0 and "What is to be learnt" in err and "[segmentation]" in err and "Which classes" in err
    code, out, err = cli("validate", "my.yaml")
    assert code == 0 and "my.yaml is valid: an experiment of" in err, err
    found = load("my.yaml", [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(found, Experiment) and found.base["task"]["names"] == ["nothing", "cell"]
    names = [method["name"] for method in found.vary.get("method", [])]
    assert names == (["full", "lora", "simplex-lora"] if model else [])
    assert found.vary.get("model") == (None if model else ["unet", "unet-refined"])
    assert len(json.loads(cli("compare", "my.yaml", "--dry-run", "--json")[1])) == (9 if model else 6)


def test_images_are_not_looked_for_in_a_table(data: str, cli: Cli) -> None:
    code, _, err = cli("init", "--data", data, "--type", "segmentation", "--label", "a,b")
    assert code == 2 and f"--type segmentation: {data} has neither train/images nor the columns image and mask" in err


def test_a_model_that_can_write_is_given_where_the_packaged_one_cannot(data: str, cli: Cli) -> None:
    cli("init", "--data", data, "--type", "causal", "--text", "body", "--label", "reply")
    text = Path("experiment.yaml").read_text()
    assert "\nmodel: gpt2-medium\n" in text and "name: head" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--data": "nowhere.csv"}, "nowhere.csv: there is no such file or folder"),
        ({"--type": "clasification"}, 'no such type (did you mean "classification"?)'),
        ({"--text": "boddy"}, '--text boddy: no such column in my tickets.csv (did you mean "body"?)'),
        ({"--label": "mood"}, "--label mood: no such column in my tickets.csv"),
        ({"--label": "body"}, "--label body: is read already; the answer needs a column of its own"),
        ({"--type": "pair"}, "--text body: pair reads two columns, as in --text question,answer"),
        ({"--text": "body,reply"}, "--text body,reply: classification reads one column"),
        ({"--label": ""}, "--label: is missing, and there is no terminal to ask on"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    flags: dict[str, str], message: str, data: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch, "", there=False)
    given = {"--data": data, "--type": "classification", "--text": "body", "--label": "kind", **flags}
    code, out, err = cli("init", *(word for pair in given.items() for word in pair))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not Path("experiment.yaml").exists()


def test_a_file_that_is_there_is_kept(data: str, cli: Cli) -> None:
    Path("experiment.yaml").write_text("mine")
    flags = ["--data", data, "--type", "classification", "--text", "body", "--label", "kind"]
    code, _, err = cli("init", *flags)
    assert code == 2 and "experiment.yaml: is there already; give another name" in err
    assert Path("experiment.yaml").read_text() == "mine"
    assert cli("init", "missing/x.yaml", *flags)[0] == 2
