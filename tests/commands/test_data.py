"""`rankwise data`: on a terminal, in a pipe and as JSON; the rows of files, of experiments and of runs."""

import io
import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console

import rankwise as rw
from chats import turns, write
from rankwise import terminal
from rankwise.commands.data import visible
from runs import bert, make

Cli = Callable[..., tuple[int, str, str]]

ESCAPE = "\x1b[31mred\x1b[0m"


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """Rows 2 to 41 of a CSV; one is long, one repeats another with another class, one is from a hostile terminal."""
    lines = [f"ticket {number} about a lamp,{'billing' if number % 3 else 'delivery'}" for number in range(36)]
    lines += ["a " * 60 + ",billing", "twice,billing", "twice,delivery", f'"{ESCAPE} caf\u00e9",billing']
    file = tmp_path / "tickets.csv"
    file.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return file


def settings(file: Path, *more: str) -> list[str]:
    return ["data", "task.type=classification", f"task.dataset={file}", "model=random-bert", "max_length=32", *more]


def test_lengths_cuts_repeats_and_classes_are_counted(cli: Cli, tickets: Path) -> None:
    code, out, _ = cli(*settings(tickets, "--json"))
    found = json.loads(out)
    train, held_out = found["splits"]
    assert code == 0 and train["rows"] + held_out["rows"] == 40 and len(found["rows"]) == 10
    longest = [each for each in (train, held_out) if each["cut"]]
    assert [each["cut"] for each in longest] == [1] and longest[0]["lengths"]["longest"] == 32
    twice = [each for each in (train, held_out) if each["contradicted"]]
    assert [(each["contradicted"], each["repeated"]) for each in twice] == [(2, 1)]
    assert sum(each["classes"]["delivery"] for each in (train, held_out)) == 13
    text = cli(*settings(tickets))[1]
    assert "2 rows of " in text and " have the input of another row, but another class" in text
    assert re.search(r"^billing +\d+ \(\d+\.\d%\)", text, re.MULTILINE)


def test_a_row_is_named_by_its_line_in_the_file(cli: Cli, tickets: Path) -> None:
    lines = tickets.read_text().splitlines()
    for row in json.loads(cli(*settings(tickets, "--json"))[1])["rows"]:
        text, label = lines[row["number"] - 1].rsplit(",", 1)
        assert row["place"] == f"line {row['number']}" and row["label"] == label
        assert "".join(row["words"]).startswith(text[:20])
    for line in (2, 17, 41):  # held out or not
        code, out, _ = cli(*settings(tickets, "--row", line))
        assert code == 0 and out.lstrip().startswith(f"line {line} of "), out
    code, _, err = cli(*settings(tickets, "--row", "1"))
    assert code == 2 and re.fullmatch(r"rankwise: --row 1: train has rows \d+ to \d+; validation has rows .*\n", err)


def test_what_others_wrote_does_not_reach_the_terminal_as_it_is(cli: Cli, tickets: Path) -> None:
    out = cli(*settings(tickets, "--row", "41"))[1]
    assert "\x1b" not in out and "  reads   \\x1b[31mred\\x1b[0m·café</s>\n" in out
    out = cli(*settings(tickets, "--row", "41", "--json"))[1]
    assert "\x1b" not in out and "".join(json.loads(out)["rows"][0]["words"]) == f"{ESCAPE} café</s>"


def test_white_space_can_be_seen() -> None:
    assert visible("a  b\tc\n") == "a··b→c⏎"
    assert visible("·\u00a0\r") == r"\xb7\xa0\r"


def test_what_is_learnt_is_marked_with_and_without_colour(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"text": f"question {number}", "target": f"answer\n{number}"} for number in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data", "task.type=causal", f"task.dataset={file}", "model=random-gpt2", "--row", "5"]
    out = cli(*given)[1]
    assert "  reads   question·4</s>\n  learns  answer⏎\n  learns  4</s>\n" in out
    [row] = json.loads(cli(*given, "--json")[1])["rows"]
    marked = [word for word, learnt in zip(row["words"], row["learnt"], strict=True) if learnt]
    assert "".join(marked) == "answer\n4</s>"
    assert [line.split()[1] for line in out.splitlines() if line.endswith(" learnt") and line[0].isdigit()] == [
        str(own) for own, learnt in zip(row["ids"], row["learnt"], strict=True) if learnt
    ]

    monkeypatch.delenv("NO_COLOR", raising=False)
    for no_color in (False, True):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, color_system="standard", no_color=no_color, highlight=False)
        monkeypatch.setattr("rich.console.Console", lambda console=console, **_: console)
        terminal.show_marked([("read", False), ("learnt \x1b[2J", True)])
        assert screen.getvalue() == f"read\n{'' if no_color else chr(27) + '[32m'}learnt \\x1b[2J" + (
            "\n" if no_color else "\x1b[0m\n"
        )


def test_of_conversations_the_answers_are_learnt(cli: Cli, tmp_path: Path) -> None:
    asked = {5: "much too long " * 40, 9: "two"}
    asked |= {number: f"short {number}" for number in range(40) if number not in asked}
    rows = [turns(asked[number], f"answer {number}", "again", "the end") for number in range(40)]
    write(tmp_path / "chat.jsonl", [{"messages": row} for row in rows])
    given = ["data", "task.type=chat", f"task.dataset={tmp_path / 'chat.jsonl'}", "model=random-llama"]
    code, out, _ = cli(*given, "max_length=128", "--json")
    splits = json.loads(out)["splits"]
    assert code == 0 and sum(each["given"] for each in splits) == 40
    assert [each["dropped"] for each in splits if each["dropped"]] == [1]
    assert sum(each["rows"] for each in splits) == 39
    assert (
        "1 rows of " in (text := cli(*given, "max_length=128")[1])
        and "nothing to learn in what the model reads" in text
    )
    [row] = json.loads(cli(*given, "--row", "10", "--json")[1])["rows"]
    pairs = zip(row["learnt"], row["words"], strict=True)
    parts = ["".join(word for _, word in part) for own, part in groupby(pairs, lambda pair: pair[0]) if own]
    assert parts == ["answer 9</s>\n", "the end</s>\n"]
    assert cli(*given, "max_length=128", "--row", "6")[0] == 2  # left out


def test_texts_are_read_in_blocks(cli: Cli, tmp_path: Path) -> None:
    write(tmp_path / "plain.jsonl", [{"text": f"text number {number}"} for number in range(60)])
    given = [
        "data",
        "task.type=text",
        f"task.dataset={tmp_path / 'plain.jsonl'}",
        "model=random-llama",
        "max_length=32",
    ]
    train = json.loads(cli(*given, "--json")[1])["splits"][0]
    assert train["rows"] < train["given"] and train["dropped"] == train["lost"] == 0
    assert train["learnt"] == train["tokens"] - train["rows"]  # the first token of a block is predicted from nothing
    text = cli(*given)[1]
    assert f"{train['given']} rows of train follow one another in {train['rows']} blocks" in text
    assert re.search(r"^line \d+ on of train: 32 tokens, 31 learnt$", text, re.MULTILINE)


def test_an_experiment_shows_its_data_once_and_a_run_its_own(cli: Cli, tmp_path: Path, tickets: Path) -> None:
    file = tmp_path / "experiment.yaml"
    task = f"task: {{type: classification, dataset: {tickets}}}\nmodel: random-bert\n"
    file.write_text(f"{task}vary: {{seed: [0, 1], method: [lora, head]}}\n")
    code, out, _ = cli("data", file)
    assert code == 0 and out.startswith("tickets (classification) as random-bert reads it, at most 128 tokens")
    file.write_text(f"{task}vary: {{max_length: [16, 32]}}\n")
    code, _, err = cli("data", file)
    assert (code, err) == (
        2,
        f"rankwise: {file}: max_length differs between the runs, 16 or 32; choose one, max_length=…\n",
    )
    assert "at most 16 tokens" in cli("data", file, "max_length=16")[1]
    folder = make(tmp_path / "run")
    assert "stdlib-kind as " in cli("data", folder)[1]
    assert cli("data", folder, "seed=1")[0] == 2


def test_images_have_sizes_and_classes(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    for split, count in (("train", 3), ("validation", 1)):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 10 + number), "red").save(tmp_path / split / "images" / f"{number}.png")
            Image.new("L", (20, 10 + number), number % 2).save(tmp_path / split / "masks" / f"{number}.png")
    given = ["data", "task.type=segmentation", f"task.dataset={tmp_path}", "task.height=64", "task.width=64"]
    code, out, err = cli(*given)
    assert code == 0, err
    assert "20×10 (1), 20×11 (1), 20×12 (1)" in out
    assert re.search(r"^foreground +4,096 \(33\.3%\) +0$", out, re.MULTILINE)
    assert cli(*given, "--row", "0")[0] == 2
    task = f"{{type: segmentation, dataset: {tmp_path}, height: 64, width: 64}}"
    (tmp_path / "two.yaml").write_text(f"task: {task}\nmethod: full\nvary: {{model: [unet, unet-refined]}}\n")
    assert cli("data", tmp_path / "two.yaml")[1] == out  # which do not read them differently


def test_a_run_notes_what_its_model_sees(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", max_steps=1, max_length=8)
    noted = json.loads(cli("data", folder, "--json")[1])
    assert cli("train", folder)[0] == 0
    found = json.loads((folder / "data.json").read_text())
    assert found["splits"] == noted["splits"] and found["splits"][0]["cut"] > 0
    assert [row["number"] for row in found["rows"]] != [row["number"] for row in noted["rows"]]
    assert len(found["rows"]) == 3 and found["splits"][0]["rows"] == 72


def test_the_same_in_python(cli: Cli, tickets: Path) -> None:
    task = {"type": "classification", "dataset": str(tickets)}
    view = rw.data({"task": task, "model": "random-bert"}, {"max_length": 32}, row=7)
    assert view.as_json() == json.loads(cli(*settings(tickets, "--row", "7", "--json"))[1])
    assert "".join(f"{line}\n" for line, _ in view.lines()) == cli(*settings(tickets, "--row", "7"))[1]


def test_weights_are_not_read(cli: Cli, tmp_path: Path, tickets: Path) -> None:
    bert(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    code, out, err = cli(*settings(tickets, f"model={tmp_path / 'model'}"))
    assert code == 0 and out.startswith("tickets (classification) as model reads it"), err
