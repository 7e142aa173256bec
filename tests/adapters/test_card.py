"""What is saved next to an adapter: what must be known to use it, the tokenizer's files, and the card."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

import models
import rankwise as rw
from models import write_llama
from rankwise.adapters.beside import base_digest
from rankwise.adapters.card import stored_ranks
from rankwise.errors import InputError
from rankwise.files import ADAPTER
from rankwise.ranks.report import by_kind
from rankwise.runs import use
from rankwise.train.run import run
from runs import make
from stock_peft import carry_out, code_of

LABELS = ["01", "1", 'no "quotes", please', "ärger"]


def rows(file: Path, count: int = 48) -> Path:
    """Texts and labels of a shop, in the columns `message` and `team`."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "message", "team"])
        writer.writerows([f"{row:05}", f"message {row} about {row % 4}", LABELS[row % 4]] for row in range(count))
    return file


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those of two equal runs in different folders."""
    folder = tmp_path_factory.mktemp("runs")
    columns = {"text": "message", "label": "team"}
    task = {"name": "classification", "dataset": str(rows(folder / "shop.csv")), "columns": columns}
    made = [make(folder / name, task=task, max_steps=3) for name in ("one", "other")]
    for each in made:
        run(each)
    return [each / "adapter" for each in made]


def test_equal_runs_leave_equal_files_beside_the_weights_without_a_path_of_the_data(adapters: list[Path]) -> None:
    one, other = adapters
    names = {path.name for path in one.iterdir()}
    assert names == {*ADAPTER[:1], *ADAPTER[2:5], "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    text = (one / "use.json").read_text(encoding="utf-8") + (one / "README.md").read_text(encoding="utf-8")
    model = json.loads((one / "use.json").read_text(encoding="utf-8"))["settings"]["model"]
    assert str(one.parents[1]) not in text.replace(model, "")
    found = use.read(one)
    assert found is not None and list(found.labels) == LABELS
    assert (found.asks, found.form, found.metric) == (["message"], "class", "accuracy")
    assert found.settings["max_length"] == 16
    state = json.loads((one / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["truncation"] is None and state["padding"] is None


@pytest.mark.large
def test_the_code_of_the_card_answers_as_the_run_did(adapters: list[Path]) -> None:
    adapter = adapters[0]
    said = carry_out(code_of(adapter), adapter)
    found = use.read(adapter)
    assert found is not None
    kind = transformers.AutoModelForSequenceClassification
    model = PeftModel.from_pretrained(kind.from_pretrained(found.settings["model"], num_labels=4), adapter).eval()
    words = transformers.AutoTokenizer.from_pretrained(adapter)
    logits = model(**words(["A text."], return_tensors="pt")).logits
    assert said == LABELS[int(logits.argmax())]
    asked = (
        'print(transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)("A text.")[0]["label"])'
    )
    assert carry_out(f"import transformers\n{code_of(adapter)}{asked}", adapter) == said


def test_a_saved_model_says_what_it_knows_without_a_run(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    (base / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Llama\n")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.v_proj": 5})
    rw.save(get_peft_model(model, config), tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "4 adapted layers, of ranks 2 to 5, 11 in total." in text
    assert "self_attn.q_proj  2 2\nself_attn.v_proj  2 5" in text
    assert "library_name: peft\ntags:\n- lora\n- rankwise\n---" in text
    assert 'license: "mit"' in text and "base_model" not in text.partition("# LoRA")[0]  # a path is no name on the hub
    assert "AutoModelForCausalLM.from_pretrained(base)" in code_of(tmp_path / "adapter")
    assert stored_ranks(tmp_path / "adapter")["model.layers.1.self_attn.v_proj"] == 5
    assert use.read(tmp_path / "adapter") is None


@pytest.mark.parametrize("config", [IA3Config(target_modules=["q_proj"], feedforward_modules=[]), None])
def test_what_is_not_lora_is_not_called_so(config: Any, tmp_path: Path) -> None:
    model, method = models.model("llama"), None
    if config is None:
        method = rw.BitFit()
        model = method.attach(models.model("bert"))
    else:
        model = get_peft_model(model, config)
    rw.save(model, tmp_path / "adapter", method)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "lora" not in text.lower() and ("# IA3 adapter" in text) == ("library_name: peft" in text) == (
        config is not None
    )


def test_ranks_of_blocks_stand_in_their_order_and_layers_without_an_adapter_at_0() -> None:
    ranks = {f"model.layers.{block}.q": block for block in (10, 9, 2)} | {"model.layers.2.v": 12, "lm_head": 3}
    assert by_kind(ranks).splitlines() == ["lm_head   3", "q         2  9 10", "v        12  0  0"]
    assert by_kind({}) == ""


def test_the_digest_of_a_base_sees_each_weight_but_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(40, 30), "head": torch.nn.Linear(30, 2)})
    before = base_digest(model, ["head"])
    assert before == base_digest(torch.nn.ModuleDict({"x": model["body"], "head": model["head"]}), ["head"])
    with torch.no_grad():
        model["head"].weight += 1
        assert base_digest(model, ["head"]) == before != base_digest(model)
        for p in model["body"].parameters():
            p *= 1.01
            assert base_digest(model, ["head"]) != before
            p /= 1.01


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"settings": {}, "labels": [1]}', "labels"),
        ('{"settings": {}, "format": 99}', "newer rankwise"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_in_one_line(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "use.json").write_text(content)
    with pytest.raises(InputError, match=f"use.json.*{says}"):
        use.read(tmp_path)


def test_a_command_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    for column in ("text", "it's", "messages"):
        command = use.Use(settings={}, asks=[column]).command(folder)
        shown = command.replace("| rankwise predict", '| cat; printf "%s"')
        done: Any = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
        row, path = done.stdout.splitlines()
        assert [*json.loads(row)] == [column] and path == str(folder)
