"""Adapters are used: scored as their run has scored them, and asked about rows of anyone's."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rankwise as rw
import warm
from methods import OPTIONS
from rankwise import tasks
from rankwise.adapters.card import CHANGED
from rankwise.commands import predict
from rankwise.commands.row_files import sink, source
from rankwise.errors import InputError
from rankwise.methods import registry
from rankwise.tasks.base import text_of
from rankwise.tasks.custom import Custom
from rankwise.train import random_model
from rankwise.train.arguments import Loading
from rankwise.train.model import build
from rankwise.train.run import run
from runs import bert, make
from stock_peft import carry_out, code_of
from waiting import wait_for

Cli = Callable[..., tuple[int, str, str]]
LABELS = ["01", "1", "NA", "ärger"]
BY_SIZE = [f"word {row} and {row % 7} more" for row in range(60)]


def texts(row: int) -> dict[str, Any]:
    return {"text": f"{BY_SIZE[row]} of it", "target": f"answer {row % 3}"}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "classification": lambda row: {"text": BY_SIZE[row], "label": LABELS[row % 4]},
    "pair": lambda row: {"text": BY_SIZE[row], "text_pair": f"other {row % 5}", "label": LABELS[row % 2]},
    "regression": lambda row: {"text": BY_SIZE[row], "label": row / 7},
    "seq2seq": texts,
    "causal": texts,
    "chat": lambda row: {
        "messages": [{"role": "user", "content": BY_SIZE[row]}, {"role": "assistant", "content": f"yes {row}"}]
    },
    "instruct": lambda row: {"instruction": BY_SIZE[row], "input": "more", "output": f"no {row}"},
    "text": lambda row: {"text": BY_SIZE[row] * 3},
}
"""A row of each of the tasks for anyone's data that read texts."""
ANSWERS = ("label", "target", "output")
MODELS = {"seq2seq": "random-t5", "causal": "random-gpt2"}
HEAVY = [*ROWS][1:]
PAIRS = ("classification", "pair", "regression")


def jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def trained(folder: Path, kind: str, **more: Any) -> Path:
    """The folder of a short run on rows of ROWS."""
    data = jsonl(folder / f"{kind}.jsonl", [ROWS[kind](row) for row in range(60)])
    task = {"name": kind, "dataset": str(data)}
    if kind in ("seq2seq", "causal"):
        task |= {"target_length": 8, "beams": 2}
    model = {} if kind in PAIRS else {"model": MODELS.get(kind, "random-llama")}
    length = {} if model == {} else {"max_length": 64}
    settings = {"task": task, "max_steps": 3, "eval_rows": None, **model, **length, **more}
    run(made := make(folder / f"run-{kind}", **settings))
    return made


def metrics(folder: Path) -> Mapping[str, float]:
    found: Mapping[str, float] = json.loads((folder / "result.json").read_text())["metrics"]
    return found


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("use"), "classification")


def test_every_task_of_ones_own_texts_is_here() -> None:
    own = {
        name for name, kind in tasks.registry().items() if issubclass(kind, Custom) and kind.family != "segmentation"
    }
    assert own == set(ROWS)


@pytest.mark.large
@pytest.mark.parametrize("kind", HEAVY)
def test_each_task_is_scored_as_its_run_was_and_asked(kind: str, tmp_path: Path) -> None:
    folder = trained(tmp_path, kind)
    check(folder, kind, tmp_path)


def test_a_classifier_is_scored_as_its_run_was_and_asked(classifier: Path, tmp_path: Path) -> None:
    check(classifier, "classification", tmp_path)


def check(folder: Path, kind: str, scratch: Path) -> None:
    """The adapter has the scores of its run to the digit, and answers rows without answers in their order."""
    [score] = rw.evaluate(folder / "adapter").scores
    assert {name: each for name, each in score.metrics.items() if name != "loss"} == metrics(folder)
    asked = [{"id": f"{row:03}", **ROWS[kind](row)} for row in range(20)]
    for row in asked:
        for name in ANSWERS:
            row.pop(name, None)
    rows, out = jsonl(scratch / "asked.jsonl", asked), scratch / "answered.jsonl"
    if kind == "text":
        with pytest.raises(InputError, match="no answers to give"):
            rw.predict(folder, rows, out)
        return
    found = rw.predict(folder, rows, out)
    assert not isinstance(found, list) and (found.rows, found.before) == (20, 0)
    lines = out.read_text(encoding="utf-8").splitlines()
    for line, given_line in zip(lines, rows.read_text(encoding="utf-8").splitlines(), strict=True):
        assert line.startswith(given_line[:-1])  # as it was typed
    answers = [json.loads(line) for line in lines]
    assert [{**row, "prediction": answer["prediction"]} for row, answer in zip(asked, answers, strict=True)] == [
        {key: value for key, value in answer.items() if not key.startswith("probability_")} for answer in answers
    ]
    if kind in ("classification", "pair"):
        classes = LABELS[: 4 if kind == "classification" else 2]
        for answer in answers:
            shares = [answer[f"probability_{name}"] for name in classes]
            assert (
                sum(shares) == pytest.approx(1, abs=1e-5) and classes[shares.index(max(shares))] == answer["prediction"]
            )
    assert rw.predict(folder / "adapter", asked) == answers
    assert sorted(path.name for path in scratch.iterdir() if "answered" in path.name) == ["answered.jsonl"]


@pytest.mark.large
@pytest.mark.parametrize("name", sorted(registry()))
def test_what_each_method_leaves_has_the_scores_of_its_run(name: str, tmp_path: Path) -> None:
    options = {"name": name, **OPTIONS.get(name, {})} | ({"infix": 0} if "infix" in OPTIONS.get(name, {}) else {})
    kind = "causal" if name == "none" else "classification"  # a classifier's head must train
    folder = trained(tmp_path, kind, method=options, max_steps=8)
    [score] = rw.evaluate(folder).scores
    assert {key: each for key, each in score.metrics.items() if key != "loss"} == metrics(folder)
    found = rw.predict(folder, [BY_SIZE[0]])
    assert isinstance(found, list) and (kind == "causal" or found[0]["prediction"] in LABELS)
    left = folder / ("model" if (folder / "model").is_dir() else "adapter")
    assert (left / "use.json").is_file() and str(tmp_path) not in (left / "use.json").read_text()


@pytest.mark.large
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_of_half_precision_are_loaded_as_in_the_run(dtype: str, tmp_path: Path) -> None:
    folder = trained(tmp_path, "regression", dtype=dtype, max_steps=8)
    [score] = rw.evaluate(folder).scores
    assert {key: each for key, each in score.metrics.items() if key != "loss"} == metrics(folder)


def pretrained(kind: str, folder: Path) -> Path:
    """A small model for a task, with its tokenizer, in a folder as users have theirs."""
    name = MODELS.get(kind, "random-llama")
    data = jsonl(folder / "words.jsonl", [ROWS[kind](row) for row in range(60)])
    words, config = random_model.build(name, rw.task({"name": kind, "dataset": str(data)}), None)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "seq2seq" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.large
@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "text"])
def test_the_code_of_each_card_answers_as_predict_does(kind: str, tmp_path: Path) -> None:
    """In plain PEFT, in a process that cannot import rankwise."""
    more = {"model": str(pretrained(kind, tmp_path)), "max_length": 64} if kind not in PAIRS else {}
    folder = trained(tmp_path, kind, learning_rate=3e-2, max_steps=6, **more)
    said = carry_out(code_of(folder / "adapter"), folder / "adapter")
    asked: dict[str, dict[str, Any]] = {
        "pair": {"text": "A text.", "text_pair": "Another one."},
        "chat": {"messages": [{"role": "user", "content": "Hello!"}]},
        "instruct": {"instruction": "Hello!"},
    }
    [answer] = rw.predict(folder, [asked.get(kind, {"text": "A text."})])  # type: ignore[misc]
    expected = answer["prediction"]
    if kind == "regression":
        assert float(said) == pytest.approx(expected, rel=1e-4)
    else:
        assert said.strip() == expected.splitlines()[-1] if expected else not said.strip()


def test_what_a_run_prints_at_its_end_can_be_pasted(classifier: Path, cli: Cli, monkeypatch: Any) -> None:
    code, out, _ = cli("train", classifier)
    assert code == 0 and "ranks, block by block\nattention.output.dense  2 2" in out
    [command] = [line for line in out.splitlines() if line.startswith("use it:")]
    echoed, _, words = command.removeprefix("use it:").strip().partition(" | ")
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(subprocess.check_output(echoed, shell=True))))
    )
    code, out, err = cli(*words.split()[1:])
    assert code == 0, err
    assert json.loads(out)["prediction"] in LABELS


@pytest.mark.parametrize("text", ["id,text\n01,a\n02,b\n", '{"id": "01", "text": "a"}\n{"id": "02", "text": "b"}\n'])
def test_rows_from_stdin_are_the_same_as_from_their_file(
    text: str, classifier: Path, tmp_path: Path, cli: Cli, monkeypatch: Any
) -> None:
    file = tmp_path / f"rows.{'csv' if text.startswith('id') else 'jsonl'}"
    file.write_text(text)
    outs = [tmp_path / f"{name}{file.suffix}" for name in ("file", "stdin")]
    assert cli("predict", classifier, "--in", file, "--out", outs[0])[0] == 0
    for out in (outs[1], "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode()))))
        code, said, err = cli("predict", classifier, "--out", out)
        assert code == 0, err
        assert (said if out == "-" else outs[1].read_text()) == outs[0].read_text()


@pytest.mark.large
@pytest.mark.parametrize("name", ["simplex-lora", "sora", "dora", "adalora", "pissa"])
def test_a_score_that_is_no_count_is_that_of_the_run_to_the_digit_too(name: str, tmp_path: Path) -> None:
    """With ranks that differ, whose scales go into B when they are saved; not what is saved in another form."""
    options = {"name": name, **OPTIONS[name]} | ({"omega_rate": 200.0, "rank": 3} if name == "simplex-lora" else {})
    folder = trained(tmp_path, "chat", method=options, max_steps=12, learning_rate=3e-2)
    [score] = rw.evaluate(folder).scores
    found = {key: each for key, each in score.metrics.items() if key != "loss"}
    assert found == (pytest.approx(metrics(folder), rel=1e-5) if name in ("adalora", "pissa") else metrics(folder))


def test_several_are_compared_on_the_same_rows_by_the_bootstrap_of_reports(
    classifier: Path, tmp_path: Path, cli: Cli
) -> None:
    rows = jsonl(tmp_path / "own.jsonl", [ROWS["classification"](row) for row in range(30)])
    code, out, err = cli("evaluate", classifier, classifier / "adapter", "--in", rows, "--json")
    assert code == 0, err
    first, second = json.loads(out)["scores"]
    assert first["metrics"] == second["metrics"] and first["gap"] is None
    assert (second["gap"], second["gap_interval"]) == (0, [0, 0])
    low, high = first["interval"]
    assert low <= first["metrics"]["accuracy"] <= high
    predicted = rw.predict(classifier, [ROWS["classification"](row)["text"] for row in range(30)])
    assert isinstance(predicted, list)
    right = [answer["prediction"] == LABELS[row % 4] for row, answer in enumerate(predicted)]
    assert first["metrics"]["accuracy"] == sum(right) / 30
    code, out, err = cli("evaluate", classifier, "--in", rows)
    assert code == 0 and "30 rows of" in out and "95 % interval" in out


REFUSED = {
    "a base of other weights": (["model={other}"], "text\na\n", "other weights than the model that it was trained on"),
    "no such column": (["task.columns.text=txt"], "text\na\n", "line 2 has no column 'txt', only text (did you mean"),
    "an empty text": ([], "id,text\n1,a\n2, \n", "line 3 has an empty text: fill it in"),
    "a column twice": ([], "id,id,text\n1,2,a\n", "the header has the column 'id' twice"),
    "an answer overwritten": ([], "text,prediction\na,b\n", "has a column 'prediction' already"),
    "a quote that is not closed": ([], 'text\n"a\n', "line 2 is not valid CSV"),
    "too many cells": ([], "text\na,b\n", "line 2 has 2 fields but the header 1"),
    "no rows": ([], "text\n", "has no rows"),
    "no text in UTF-8": ([], b"text\n\xe4\n", "line 2 is not text in UTF-8"),
    "another kind of answers": (["task=causal"], "text\na\n", "was not trained to give answers of the kind of causal"),
    "values for classes": (["task=regression"], "text\na\n", "'01', '1' and 2 more, those of regression are none"),
    "other classes": (["task=mrpc"], "text\na\n", "not_equivalent"),
    "a setting that is none": (["colums=3"], "text\na\n", "colums: there is no such key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    case: str, classifier: Path, tmp_path: Path, cli: Cli, capsys: Any
) -> None:
    given_settings, content, says = REFUSED[case]
    rows, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    rows.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case == "a base of other weights":
        given_settings = [f"model={bert(tmp_path / 'other', dropout=0.1)}"]
        change(tmp_path / "other")
        capsys.readouterr()
    code, _, err = cli("predict", classifier, *given_settings, "--in", rows, "--out", out)
    assert code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))]


def change(folder: Path) -> None:
    """Change a single row of a model's weights."""
    model = transformers.AutoModel.from_pretrained(folder)
    model.encoder.layer[1].output.dense.weight.data[3] += 0.01
    model.save_pretrained(folder)


def test_a_file_that_is_there_stays_without_force(classifier: Path, tmp_path: Path, cli: Cli) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    rows.write_text("text\na\n")
    out.write_text("mine")
    code, _, err = cli("predict", classifier, "--in", rows, "--out", out)
    assert code == 2 and "is there already" in err and out.read_text() == "mine"
    code, _, err = cli("predict", classifier, "--in", rows, "--out", rows, "--force")
    assert code == 2 and "the file that the rows come from" in err and rows.read_text() == "text\na\n"
    code, _, err = cli("predict", classifier, "--in", rows, "--out", out, "--force")
    assert code == 0 and out.read_text().startswith("text,prediction,")


def test_an_adapter_that_says_nothing_of_its_task_is_asked_with_it(classifier: Path, tmp_path: Path, cli: Cli) -> None:
    old = tmp_path / "old"
    shutil.copytree(classifier / "adapter", old)
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": BY_SIZE[0]}])
    assert cli("predict", old, "--in", rows)[0] == 0  # away from its run and its data
    code, _, err = cli("evaluate", old)
    assert code == 2 and "nothing next to it says where its rows are: give a file, --in FILE" in err
    (old / "use.json").unlink()
    code, _, err = cli("predict", old, "--in", rows)
    assert code == 2 and "nothing next to it says what its task is" in err
    code, _, err = cli("predict", old, "task=classification", "--in", rows)
    assert code == 2 and "nothing says which classes its outputs stand for" in err
    data = classifier.parent / "classification.jsonl"
    task = f"task={{type: classification, dataset: {data}}}"
    answers = [
        cli("predict", each, *more, "--in", rows)[1]
        for each, more in ((old, [task, "max_length=16"]), (classifier, []))
    ]
    assert answers[0] == answers[1] != ""


def test_a_model_that_was_tuned_elsewhere_answers_with_its_own_classes(tmp_path: Path, cli: Cli) -> None:
    base, tuned = bert(tmp_path / "base"), tmp_path / "tuned"
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": "so", "label": "bad"}, {"text": "or so", "label": "good"}])
    code, _, err = cli(
        "predict", base, f"task={{type: classification, dataset: {rows}}}", "max_length=16", "--in", rows
    )
    assert code == 2 and "classifier.weight is not in its checkpoint" in err
    names = {"num_labels": 2, "id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    transformers.AutoModelForSequenceClassification.from_pretrained(base, **names).save_pretrained(tuned)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tuned)
    code, out, err = cli("predict", tuned, "task=classification", "max_length=16", "--in", rows)
    assert code == 0, err
    assert list(json.loads(out.splitlines()[0])) == [
        "text",
        "label",
        "prediction",
        "probability_good",
        "probability_bad",
    ]
    code, out, err = cli("evaluate", tuned, "task=classification", "max_length=16", "--in", rows, "--json")
    assert code == 0 and json.loads(out)["scores"][0]["metrics"]["accuracy"] in (0, 0.5, 1), err


def test_the_card_of_a_smaller_adapter_says_so(classifier: Path, tmp_path: Path) -> None:
    for name, like in (("one", classifier / "adapter"), ("two", tmp_path / "one")):
        rw.resize_adapter(like, tmp_path / name, rank=1)
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert card.count(CHANGED) == 1 and "all of rank 1." in card and "query    1 1" in card
        assert code_of(tmp_path / name) == code_of(classifier / "adapter")
    assert rw.predict(tmp_path / "two", ["so"])


def test_an_adapter_from_a_loop_of_ones_own_answers_too(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", dropout=0.0)
    data = jsonl(tmp_path / "rows.jsonl", [ROWS["classification"](row) for row in range(40)])
    task = rw.task({"type": "classification", "dataset": str(data)})
    model, words, head = build(base, task, max_length=16)
    method = rw.LoRA(rank=2)
    model = method.attach(model, head)
    with pytest.raises(InputError, match="max_lenth: is not among the settings saved next to an adapter.*; these are"):
        rw.Use.of_task(task, base, max_lenth=16)
    rw.save(model, tmp_path / "adapter", method, head, use=rw.Use.of_task(task, base, max_length=16), tokenizer=words)
    [answer] = rw.predict(tmp_path / "adapter", [BY_SIZE[0]])  # type: ignore[misc]
    with torch.no_grad():
        logits = model.eval()(**words([BY_SIZE[0]], return_tensors="pt")).logits[0]
    assert answer["prediction"] == LABELS[int(logits.argmax())]
    shares = [answer[f"probability_{label}"] for label in LABELS]
    assert shares == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.large)])
def test_with_a_digest_it_is_refused_on_other_base_weights(dtype: str, tmp_path: Path, cli: Cli) -> None:
    base = bert(tmp_path / "base", dropout=0.0)
    data = jsonl(tmp_path / "rows.jsonl", [ROWS["classification"](row) for row in range(40)])
    task = rw.task({"type": "classification", "dataset": str(data)})
    model, words, head = build(base, task, 16, loading=Loading(dtype=dtype))
    digest = rw.base_digest(model, head)
    model = rw.LoRA(rank=2).attach(model, head)
    for name, use in (
        ("adapter", rw.Use.of_task(task, base, digest, max_length=16, dtype=dtype)),
        ("without", rw.Use.of_task(task, base, max_length=16, dtype=dtype)),
    ):
        rw.save(model, tmp_path / name, head=head, use=use, tokenizer=words)
        assert rw.predict(tmp_path / name, [BY_SIZE[0]])
    weights = load_file(Path(base) / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, Path(base) / "model.safetensors")
    for command in ("predict", "evaluate"):
        code, _, err = cli(command, tmp_path / "adapter", "--in", data)
        assert code == 2 and "has other weights than the model that it was trained on" in err.splitlines()[-1]
    assert rw.predict(tmp_path / "without", [BY_SIZE[0]])


@pytest.mark.large
def test_a_chat_template_of_ones_own_goes_with_the_adapter(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    data = jsonl(tmp_path / "chat.jsonl", [ROWS["chat"](row) for row in range(60)])
    task = {"name": "chat", "dataset": str(data), "template": str(file)}
    folder = trained(tmp_path, "chat", task=task)
    asked = [{"messages": [{"role": "user", "content": BY_SIZE[0]}]}]
    before = rw.predict(folder, asked)
    shutil.copytree(folder / "adapter", tmp_path / "copied")
    file.unlink()
    assert rw.predict(tmp_path / "copied", asked) == before
    [score] = rw.evaluate(tmp_path / "copied", rows=data).scores
    assert score.metrics["perplexity"] > 1
    assert "assistant: " in (tmp_path / "copied" / "chat_template.jinja").read_text()


@pytest.mark.large
def test_a_killed_command_goes_on_and_writes_the_same_bytes(classifier: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "note"])
        writer.writerows([f"{row:05}", f'say "{row}"\nagain, {row % 11}', ""] for row in range(1500))

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "rankwise", "predict", str(classifier), "--in", str(rows), "--out", str(out)]

    alone, out = tmp_path / "alone.csv", tmp_path / "out.csv"
    part = tmp_path / "out.csv.part"
    for _ in range(2):
        before = part.stat().st_size if part.exists() else 200
        process = warm.Popen(command(out), stdout=sys.stderr, stderr=sys.stderr)
        wait_for(lambda: (part.exists() and part.stat().st_size > before) or process.poll() is not None)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not out.exists()
    with part.open("ab") as file:
        file.write(b'[["cut')  # as a process leaves it that is killed while it writes
    done = warm.run(command(out), capture_output=True, text=True)
    assert done.returncode == 0 and "goes on after row" in done.stderr, done.stderr
    done = warm.run(command(alone), capture_output=True, text=True)
    assert done.returncode == 0 and "goes on" not in done.stderr
    assert out.read_bytes() == alone.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "alone.csv", "out.csv"}
    given_rows, answered = ([*csv.reader(io.StringIO(each.read_text("utf-8-sig"), newline=""))] for each in (rows, out))
    assert [row[:3] for row in answered] == given_rows


def test_a_file_in_the_home_folder_can_be_named_by_a_tilde(
    classifier: Path, tmp_path: Path, cli: Cli, monkeypatch: Any
) -> None:
    """The shell leaves `--in=~/rows.csv` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.csv").write_text("text\nword 1\n")
    code, _, err = cli("predict", classifier, "--in=~/rows.csv", "--out=~/answered.csv")
    assert code == 0 and (tmp_path / "answered.csv").is_file(), err


def test_answers_to_other_rows_are_not_gone_on_with(classifier: Path, tmp_path: Path, cli: Cli) -> None:
    rows, part = tmp_path / "rows.csv", tmp_path / "out.csv.part"
    rows.write_text("text\na\n")
    part.write_text('{"rows": "x", "weights": "y", "settings": "z"}\n[["01", 1, 0, 0, 0]]\n')
    code, _, err = cli("predict", classifier, "--in", rows, "--out", tmp_path / "out.csv")
    assert code == 2 and "holds answers made with other rows; delete it" in err and part.exists()


@pytest.mark.parametrize("content", ["my notes\n", '{"rows": "x"', "[1, 2]\n[3"])
def test_a_file_of_ones_own_in_the_place_of_the_answers_so_far_stays(
    content: str, classifier: Path, tmp_path: Path, cli: Cli
) -> None:
    rows, part = tmp_path / "rows.csv", tmp_path / "out.csv.part"
    rows.write_text("text\na\n")
    part.write_text(content)
    code, _, err = cli("predict", classifier, "--in", rows, "--out", tmp_path / "out.csv")
    assert code == 2 and f"{part}: " in err and err.count("\n") == 1, err
    assert part.read_text() == content and not (tmp_path / "out.csv").exists()


def test_answers_of_a_model_that_has_changed_since_are_not_gone_on_with(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, out = bert(tmp_path / "base"), tmp_path / "rows.csv", tmp_path / "out.csv"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "good", 1: "bad"})
    model.save_pretrained(base)
    rows.write_text("text\n" + "a\n" * 20)
    command = ("predict", base, "task=classification", "max_length=16", "batch_size=1", "--in", rows, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "sink", lambda *_: 1 / 0)
        assert cli(*command)[0] == 1 and (tmp_path / "out.csv.part").exists()
    model.classifier.weight.data += 1
    model.save_pretrained(base)
    code, _, err = cli(*command)
    assert code == 2 and "holds answers made with other weights; delete it" in err and not out.exists(), err


def test_answers_of_an_adapter_of_another_scale_are_not_gone_on_with(
    classifier: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is in PEFT's configuration, not among the weights."""
    adapter, rows, out = tmp_path / "adapter", tmp_path / "rows.csv", tmp_path / "out.csv"
    shutil.copytree(classifier / "adapter", adapter)
    rows.write_text("text\n" + "a\n" * 20)
    command = ("predict", adapter, "batch_size=1", "--in", rows, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "sink", lambda *_: 1 / 0)
        assert cli(*command)[0] == 1 and (tmp_path / "out.csv.part").exists()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    code, _, err = cli(*command)
    assert code == 2 and "holds answers made with other weights; delete it" in err and not out.exists(), err


def test_what_is_not_there_is_said_before_a_model_is_loaded(
    classifier: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.train.model.build", lambda *_: 1 / 0)
    rows, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    out.write_text("mine")
    for command, says in (
        (("predict", classifier, "--in", rows, "--out", out), f"{rows}: there is no such file"),
        (("predict", classifier, "--in", rows, "--out", out, "--force"), f"{rows}: there is no such file"),
        (("predict", classifier, "--in", out, "--out", tmp_path / "no" / "out.csv"), "there is no folder"),
        (("evaluate", classifier, "--in", rows), f"{rows}: there is no such file"),
        (("evaluate", classifier, tmp_path / "no"), f"{tmp_path / 'no'}: there is no such folder"),
        (
            ("evaluate", "nope"),
            "nope: there is no such folder; if it is a model on the hub, give its task, as in task=",
        ),
        (("evaluate", classifier, "runs/nope", "--in", out), "runs/nope: there is no such folder; if it is a model"),
        (("evaluate", "nope.gguf"), "nope.gguf: there is no such file"),
        (("predict", "nope.gguf", "task=mrpc", "--in", out), "nope.gguf: there is no such file"),
    ):
        code, _, err = cli(*command)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert out.read_text() == "mine"


@pytest.mark.parametrize("kind", ["classification", "chat", "instruct"])
def test_columns_that_are_not_read_may_hold_anything(kind: str, tmp_path: Path) -> None:
    task = rw.task({"type": kind, "dataset": str(jsonl(tmp_path / "rows.jsonl", [ROWS[kind](0), ROWS[kind](1)]))})
    others = {"id": 10**30, "tags": ["a", 1, {}], "when": {"a": []}}
    assert task.question({**ROWS[kind](0), **others}, "row 0") == task.question(ROWS[kind](0), "row 0")


def test_a_number_of_any_size_is_read_as_a_text() -> None:
    assert [text_of({"text": each}, "text", "row 0") for each in (7, 10**30, 1.5)] == ["7", f"1{'0' * 30}", "1.5"]


CELLS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_rows_of_csv_come_out_as_they_went_in(
    rows: list[tuple[str, str]], delimiter: str, end: str, mark: bool, quoting: int, tmp_path_factory: Any
) -> None:
    text = ""
    for row in [("id", 'the "text"'), *rows]:
        line = io.StringIO(newline="")
        csv.writer(line, delimiter=delimiter, lineterminator="\r\n", quoting=quoting).writerow(row)  # type: ignore[arg-type]
        text += line.getvalue().removesuffix("\r\n") + end
    file = tmp_path_factory.mktemp("csv") / "rows.csv"
    file.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    answers = [
        {"prediction": f'{place}{delimiter}"x"\n\r{place}', "probability_é": place / 8} for place in range(len(rows))
    ]
    for kind in ("csv", "jsonl", "parquet"):
        out = io.BytesIO()
        with source(str(file)) as found:
            written = sink(found, kind, [*answers[0]], out)
            left = iter(answers)
            for batch in found.batches(2):
                written.write(batch, [next(left) for _ in batch])
            written.close()
        if kind == "csv":
            assert out.getvalue().startswith(b"\xef\xbb\xbf") == mark
            again = [*csv.reader(io.StringIO(out.getvalue().decode("utf-8-sig"), newline=""), delimiter=delimiter)]
            assert [tuple(row[:2]) for row in again] == [("id", 'the "text"'), *rows]
            assert [row[2:] for row in again[1:]] == [[str(each) for each in answer.values()] for answer in answers]
            continue
        lines = out.getvalue().decode().split("\n")[:-1] if kind == "jsonl" else []
        again = [json.loads(line) for line in lines] or pyarrow.parquet.read_table(
            pa.BufferReader(out.getvalue())
        ).to_pylist()
        assert again == [
            {"id": first, 'the "text"': second, **answer} for (first, second), answer in zip(rows, answers, strict=True)
        ]


def test_types_of_parquet_and_numbers_of_jsonl_stay(classifier: Path, tmp_path: Path) -> None:
    table = pa.table(
        {"text": BY_SIZE[:5], "day": pa.array([1, 2, None, 4, 5], pa.date32()), "n": pa.array(range(5), pa.int16())}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rw.predict(classifier, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.select(["text", "day", "n"]).equals(table) and found["prediction"].to_pylist()
    (tmp_path / "rows.jsonl").write_text('{"x": 1.00, "text": "caf\\u00e9", "id": 12345678901234567890}\n')
    rw.predict(classifier, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert (
        (tmp_path / "out.jsonl")
        .read_text()
        .startswith('{"x": 1.00, "text": "caf\\u00e9", "id": 12345678901234567890, ')
    )
