"""Data of anyone's own: every type, every kind of file, and what is wrong with it in one line."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from sklearn.metrics import f1_score
from transformers import set_seed

import rankwise as rw
from asserts import refused
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.metrics import METRICS, classification
from rankwise.settings import RunConfig, json_schema, load
from rankwise.sweep.check import schema as known
from rankwise.tasks.custom import Custom
from rankwise.tasks.generation import Generation
from rankwise.train import model as models
from rankwise.train.run import run
from runs import lines, make

REVIEWS = [
    {"body": f"the film, number {i}, was {'good' if i % 3 else 'bad'}", "mood": "+" if i % 3 else "-"}
    for i in range(30)
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def reviews(folder: Path, **options: Any) -> Any:
    columns = {"text": "body", "label": "mood"}
    return tasks.build({"name": "classification", "dataset": str(folder), "columns": columns, **options})


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"train{ending}", REVIEWS[:20])
    write(tmp_path / f"validation{ending}", REVIEWS[20:])
    task = reviews(tmp_path)
    assert task.labels == ("+", "-") and task.label == f"{tmp_path.name} (classification)"
    train, validation = task.train(), task.evaluation()[0]
    assert train.data["text"][:] == [row["body"] for row in REVIEWS[:20]]
    assert validation.data["label"][:] == [task.labels.index(row["mood"]) for row in REVIEWS[20:]]
    assert not train.official and train.labelled
    assert task.revision() == reviews(tmp_path).revision()


def test_a_single_file_holds_out_a_tenth_by_content(tmp_path: Path) -> None:
    rows = [{"body": f"text {i // 2}", "mood": i % 2} for i in range(400)]  # each text twice
    task = reviews(write(tmp_path / "all.csv", rows))
    train, held = task.train().data["text"][:], task.evaluation()[0].data["text"][:]
    assert len(train) + len(held) == 400 and 10 <= len(held) <= 80
    assert not set(train) & set(held)
    assert task.labels == ("0", "1") and task.train().own == "your file that were not held out"
    again = reviews(write(tmp_path / "turned.csv", rows[::-1]))
    assert again.evaluation()[0].data["text"][:] == held[::-1]


def test_classes_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"body": f"a {i}", "mood": i % 12 - 1} for i in range(24)])
    assert reviews(tmp_path).labels == tuple(str(number) for number in range(-1, 11))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "metrics"),
    [
        (
            "pair",
            {"a": "one text", "b": "another", "same": "yes"},
            {"text": "a", "text_pair": "b", "label": "same"},
            {"accuracy", "matthews"},
        ),
        pytest.param(
            *("regression", {"a": "one text", "grade": 1.5}, {"text": "a", "label": "grade"}, {"pearson", "spearman"}),
            marks=pytest.mark.large,
        ),
    ],
)
def test_a_run_on_own_data(
    tmp_path: Path, name: str, rows: dict[str, Any], columns: dict[str, str], metrics: set[str]
) -> None:
    for split in ("train", "validation"):
        many = [{**rows, "a": f"text number {i}"} for i in range(24)]
        for i, row in enumerate(many):
            row |= {"same": "yes" if i % 2 else "no"} if name == "pair" else {"grade": i / 4}
        write(tmp_path / "data" / f"{split}.jsonl", many)
    task = {"name": name, "dataset": str(tmp_path / "data"), "columns": columns}
    result = run(make(tmp_path / "run", task=task, max_steps=2, batch_size=8))
    assert set(result["metrics"]) == metrics and result["task"] == f"data ({name})"
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.parametrize(
    ("name", "model"), [("seq2seq", "random-t5"), pytest.param("causal", "random-gpt2", marks=pytest.mark.large)]
)
def test_a_text_is_written_for_own_data(tmp_path: Path, name: str, model: str) -> None:
    write(tmp_path / "data" / "train.csv", [{"in": f"say {i}", "out": f"it is {i}"} for i in range(16)])
    write(tmp_path / "data" / "test.csv", [{"in": "say 3", "out": "it is 3"}])
    options = {"columns": {"text": "in", "label": "out"}, "split": "test", "target_length": 8, "beams": 1}
    task = {"name": name, "dataset": str(tmp_path / "data"), **options}
    folder = make(tmp_path / "run", task=task, model=model, max_steps=2, batch_size=8)
    assert set(run(folder)["metrics"]) == {"rouge_l", "rouge_1", "rouge_2"}
    rows = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist()
    assert rows[0]["source"] == "say 3" and rows[0]["references"] == ["it is 3"]


@pytest.mark.large
def test_none_scores_the_model_as_it_comes(tmp_path: Path) -> None:
    """It takes no step, whatever the settings say of steps, and writes what the base model writes."""
    write(tmp_path / "data" / "train.csv", [{"in": f"say {i}", "out": f"it is {i}"} for i in range(16)])
    write(tmp_path / "data" / "test.csv", [{"in": f"say {i}", "out": f"it is {i}"} for i in range(5)])
    options = {"columns": {"text": "in", "label": "out"}, "split": "test", "target_length": 8, "beams": 1}
    task = {"name": "causal", "dataset": str(tmp_path / "data"), **options}
    settings = {"task": task, "model": "random-llama", "batch_size": 8, "eval_every": 1, "checkpoint_every": 1}
    folders = [make(tmp_path / str(n), method={"name": "none"}, max_steps=n, **settings) for n in (1, 3)]
    results = [run(folder) for folder in folders]
    assert results[0]["parameters"] == {"trainable": 0, "final": 0, "budget": 0, "head": 0}
    first, evaluation = lines(folders[0] / "metrics.jsonl")
    assert first == {"step": 0, "steps": 0} and evaluation["step"] == 0 and evaluation["eval"]
    rows = [pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist() for folder in folders]
    assert rows[0] == rows[1] and results[0]["metrics"] == results[1]["metrics"]
    built = tasks.build(task)
    set_seed(0)
    model, tokenizer, _ = models.build("random-llama", built, 16, built.train())
    again = rw.load(model, folders[0] / "adapter").eval()
    [split] = built.evaluation()
    assert isinstance(built, Generation)
    written = built.generate(again, built.encode(split, tokenizer, 16), tokenizer, 8)
    assert written == [row["prediction"] for row in rows[0]] and any(written)


def unread(task: Any) -> str:
    return refused(lambda: (task.train(), task.evaluation()))


def test_what_is_wrong_is_said_with_file_and_row(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", REVIEWS[:20])
    write(tmp_path / "validation.csv", [*REVIEWS[20:23], {"body": "odd", "mood": "?"}])
    assert f"{tmp_path / 'validation.csv'}: the label '?' in line 5 is not among those of the training rows" in unread(
        reviews(tmp_path)
    )
    assert "no column 'bodies', only body, mood (did you mean \"body\"?)" in unread(
        reviews(tmp_path, columns={"text": "bodies", "label": "mood"})
    )
    (tmp_path / "validation.csv").unlink()
    assert "validation.parquet does not exist (nor .csv or .jsonl or .json)" in unread(reviews(tmp_path))
    write(train, [{"body": " ", "mood": "+"}, *REVIEWS])
    assert f"{train} has an empty body in line 2" in unread(reviews(tmp_path))
    train.write_bytes("body,mood\nhällo,+\n".encode("latin-1"))
    assert f"{train}: line 2 is not text in UTF-8" in unread(reviews(tmp_path))
    write(train, [{"body": f"a {i}", "mood": "+"} for i in range(3)])
    assert "has one class only, '+'" in unread(reviews(tmp_path))
    grades = {"name": "regression", "dataset": str(tmp_path), "columns": {"text": "body", "label": "mood"}}
    message = unread(tasks.build(grades))
    assert "column 'mood' does not hold float in line 2" in message
    assert message.endswith("): correct it or leave it out")
    write(train, [{"body": "a", "mood": "nan"}])
    assert "the label nan in line 2 is not finite" in unread(tasks.build(grades))
    assert "there is no such file or folder" in unread(reviews(tmp_path / "gone.csv"))


def test_options_that_make_no_sense_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a dataset"):
        tasks.build("pair")
    with pytest.raises(InputError, match=r"no role 'txt' \(did you mean \"text\"\?\); it has text, label"):
        reviews(tmp_path, columns={"txt": "body"})


OWN = sorted(name for name, kind in tasks.registry().items() if issubclass(kind, Custom))


@pytest.mark.parametrize("name", OWN)
def test_no_column_has_two_roles(name: str) -> None:
    """Be it that two roles name it, or that one names what another means when it is silent."""
    roles = tasks.registry()[name].roles
    assert {"classification", "pair", "regression", "seq2seq", "causal", "segmentation"} <= set(OWN)
    for one, other in itertools.permutations(roles, 2):
        both = refused(lambda one=one, other=other: build(name, {one: "x", other: "x"}))
        assert "'x' has two roles" in both or "two words for what is to be written" in both
        unnamed = build_or_refusal(name, {one: other})
        used = tasks.build({"name": name, "dataset": "d", "columns": {one: "x"}}).used
        # a role that is not used, such as the second text of a regression, is no other column's rival
        assert (f"{other!r} has two roles" in unnamed) == (other in used), (one, other)


def build(name: str, columns: dict[str, str]) -> Any:
    return tasks.build({"name": name, "dataset": "d", "columns": columns})


def build_or_refusal(name: str, columns: dict[str, str]) -> str:
    try:
        build(name, columns)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("classification", [("pos ", "pos"), ("neg", "neg")], ("text", "label")),
        ("pair", [("a", "pos", "pos"), ("b", "neg", "neg")], ("text", "text_pair", "label")),
        ("regression", [("0.1", "0.10"), ("2", "2.0")], ("text", "label")),
        ("segmentation", [(b"1", b"1"), (b"2", b"2")], ("image", "mask")),
    ],
)
def test_a_column_that_has_every_answer_is_not_read(
    tmp_path: Path, name: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...]
) -> None:
    write(tmp_path / "train.parquet", [dict(zip(columns, row, strict=True)) for row in rows])
    task = tasks.build({"name": name, "dataset": str(tmp_path), "columns": {columns[0]: columns[0]}, "split": "train"})
    assert f"the column {columns[-2]!r} has the answer of every row: name another one as {columns[-2]}" in unread(task)


def test_a_text_may_be_there_to_be_copied_which_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.csv", [{"text": f"t {i}", "target": f"t {i}"} for i in range(4)])
    task = tasks.build({"name": "causal", "dataset": str(tmp_path), "split": "train"})
    assert task.train().note == "each target is its own text"
    assert "train.csv: each target is its own text" in capsys.readouterr().err
    assert "two words for what is to be written" in refused(lambda: build("causal", {"target": "a", "label": "b"}))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pos", "pos "),
        ("pos", "po\u200bs"),
        ("caf\u00e9", "cafe\u0301"),
        ("a b", "a  b"),
        ("\uff11", "1"),
        ("a b", "a\u00a0b"),
        ("1", "1.0"),
    ],
)
def test_labels_that_look_alike_are_refused(tmp_path: Path, one: str, other: str) -> None:
    rows = [{"body": f"text {i}", "mood": (one, other, "else")[i % 3]} for i in range(9)]
    for ending in (".csv", ".jsonl", ".parquet"):
        file = write(tmp_path / f"data{ending}", rows)
        message = unread(reviews(file))
        assert f"has the labels {min(one, other)!a} and {max(one, other)!a}, which look alike" in message


def test_labels_that_differ_in_case_alone_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.csv", [{"body": f"text {i}", "mood": ("pos", "Pos", "neg")[i % 3]} for i in range(9)])
    task = reviews(tmp_path, split="train")
    told = "the labels 'Pos' and 'pos' differ in case alone, and are two classes"
    assert told in task.train().note and len(task.labels) == 3
    assert capsys.readouterr().err == f"warning: {tmp_path / 'train.csv'}: {told}\n"
    assert task.train() and capsys.readouterr().err == ""


def test_rows_to_score_that_are_trained_on_are_told(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", REVIEWS[:20])
    write(tmp_path / "validation.csv", REVIEWS[18:25])
    write(tmp_path / "test.csv", REVIEWS[25:])
    told = "2 of 7 rows are read in training too"
    assert (reviews(tmp_path).evaluation()[0].note, reviews(tmp_path).evaluation()[0].own) == (told, "your own data")
    test, train = reviews(tmp_path, split="test").evaluation()[0], reviews(tmp_path).train()
    assert (test.note, train.note, test.own, train.own) == ("", "", "your own data", "your own data")


def test_columns_that_look_alike_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("body,mood, mood\na,1,2\nb,2,1\n")
    assert f"{file} has the columns 'mood' and ' mood', which look alike: rename one" in unread(reviews(file))


def test_scores_of_own_data_are_those_of_its_labels(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", REVIEWS)
    task = reviews(tmp_path, split="train")
    split = task.evaluation()[0]
    assert task.score(split, np.asarray(split.data["label"][:])) == {"accuracy": 1.0, "matthews": 1.0}


def test_own_data_is_scored_by_the_metrics_that_are_named(tmp_path: Path) -> None:
    task = reviews(write(tmp_path / "all.csv", REVIEWS), metrics=["macro_f1", "recall", "matthews_corrcoef"])
    assert (task.metrics, task.main) == (("f1_macro", "recall", "matthews"), "f1_macro")
    assert task.label == "all (classification, f1_macro)"
    split = task.evaluation()[0]
    labels = np.asarray(split.data["label"][:])
    assert task.score(split, labels * 0) == {
        "f1_macro": f1_score(labels, labels * 0, average="macro"),
        "recall": 0.0,
        "matthews": 0.0,
    }


def test_metrics_left_out_are_accuracy_and_matthews_and_no_part_of_the_id(tmp_path: Path) -> None:
    file = str(write(tmp_path / "all.csv", REVIEWS))
    plain = {"name": "classification", "dataset": file, "columns": {"text": "body", "label": "mood"}}
    task = tasks.build(plain)
    assert (task.metrics, task.main, task.label) == (("accuracy", "matthews"), "accuracy", "all (classification)")
    schema = known()
    configs = [
        load({"task": {**plain, **more}}, schema=schema)
        for more in ({}, {"metrics": ["accuracy", "matthews_corrcoef"]}, {"metrics": ["f1_macro"]})
    ]
    assert configs[0].id == configs[1].id == RunConfig(task=plain).id != configs[2].id
    typed = load({"task": plain}, ["task.metrics=[macro_f1]"], schema)
    assert typed.id == configs[2].id and typed.task["metrics"] == ["f1_macro"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("f1_macro", "task.metrics = 'f1_macro': expected list"),
        ([], "task classification: metrics: is empty; name one metric or more, or leave it out"),
        (
            ["f1_marco"],
            "task classification: metrics: 'f1_marco' is no metric of classification (did you mean \"f1_macro\"?)",
        ),
        (["roc_auc"], "task classification: metrics: 'roc_auc' is computed from probabilities"),
    ],
)
def test_unknown_metrics_are_refused_before_a_run(metrics: Any, message: str) -> None:
    task = {"type": "classification", "dataset": "all.csv", "metrics": metrics}
    assert refused(lambda: load({"task": task}, schema=known())).startswith(message)


def test_a_metric_of_two_classes_names_its_class_or_is_refused(tmp_path: Path) -> None:
    three = [{**row, "mood": "+-0"[place % 3]} for place, row in enumerate(REVIEWS)]
    task = reviews(write(tmp_path / "three.csv", three), metrics=["accuracy", "f1"])
    assert refused(task.train) == (
        f"metrics: f1 is for two classes, and {tmp_path / 'three.csv'} has 3; "
        "take one of f1_macro, f1_micro, f1_weighted"
    )
    own = {"name": "classification", "dataset": str(write(tmp_path / "two.csv", REVIEWS)), "metrics": ["f1"]}
    own["columns"] = {"text": "body", "label": "mood"}
    result = run(make(tmp_path / "run", task=own, max_steps=2, batch_size=8))
    assert (result["score"], set(result["metrics"])) == ("f1", {"f1"})
    assert "f1 is that of the class '-'" in result["notes"]


def test_a_macro_mean_without_a_class_says_so(tmp_path: Path) -> None:
    rows = [{"body": f"text {place}", "mood": "abc"[place % 3]} for place in range(24)]
    write(tmp_path / "data" / "train.csv", rows)
    write(tmp_path / "data" / "validation.csv", [row for row in rows if row["mood"] != "b"])
    task = {"name": "classification", "dataset": str(tmp_path / "data"), "columns": {"text": "body", "label": "mood"}}
    note = "no evaluation row is labelled 'b': f1_macro is a mean over the classes that occur"
    for metrics, noted in ((["accuracy", "f1_macro"], True), (["accuracy"], False)):
        folder = make(tmp_path / metrics[-1], task={**task, "metrics": metrics}, max_steps=2, batch_size=8)
        assert (note in run(folder)["notes"]) == noted


def test_of_two_equally_frequent_classes_the_one_with_the_higher_f1_is_the_constant_answer(tmp_path: Path) -> None:
    rows = [{"body": f"text {place}", "mood": "ab"[place % 2]} for place in range(20)]
    task = reviews(write(tmp_path / "train.csv", rows).parent, metrics=["f1"], split="train")
    split = task.evaluation()[0]
    outputs = np.tile([1.0, 0.0], (len(split.data), 1))
    found = task.answers(split, outputs, task.decode(outputs))
    assert (found.majority, found.tied, found.metrics) == ("b", ["a"], {"f1": pytest.approx(2 / 3)})


def test_of_equally_frequent_classes_the_one_with_the_least_error_is_the_constant_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "distance", METRICS["mean_absolute_error"])  # as of a plugin
    monkeypatch.setitem(classification.METRICS, "distance", METRICS["mean_absolute_error"])
    rows = [{"body": f"text {place}", "mood": place % 3} for place in range(30)]
    task = reviews(write(tmp_path / "train.csv", rows).parent, metrics=["distance"], split="train")
    found = task.answers(task.evaluation()[0], np.zeros((30, 3)), np.zeros(30, dtype=int))
    assert (found.majority, found.metrics) == ("1", {"distance": pytest.approx(2 / 3)})


def test_metrics_are_in_the_schema_for_editors() -> None:
    parts = {
        part["properties"]["name"]["const"]: part for part in json_schema(known())["properties"]["task"]["oneOf"][1:]
    }
    for name, default in (("pair", ["accuracy", "matthews"]), ("regression", ["pearson", "spearman"])):
        option = parts[name]["properties"]["metrics"]
        assert option["default"] == default and {*default} < {*option["items"]["enum"]}
    assert "macro_f1" in parts["classification"]["properties"]["metrics"]["items"]["enum"]
    assert "neg_mean_absolute_error" in parts["regression"]["properties"]["metrics"]["items"]["enum"]
    assert "metrics" not in parts["seq2seq"]["properties"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"body": "a", "mood": 1}\n{"body": "b", "body": "c", "mood": 2}\n',
            "line 2 is not JSON (it has the key 'body' twice",
        ),
        ('{"body": "a", "mood": 1.5}\n{"body": "b", "mood": NaN}\n', "the label nan in line 2 is no class"),
        ('{"body": "cut \\\\ud83d", "mood": 1}\n', "line 1 is not JSON"),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
    ],
)
def test_json_that_means_nothing_is_unread(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(content.replace("\\\\", "\\"))
    assert message in unread(reviews(tmp_path))


def test_a_parquet_file_with_a_column_twice_is_unread(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"], ["c"]], names=["body", "body", "mood"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert "has the column 'body' twice" in unread(reviews(tmp_path))
