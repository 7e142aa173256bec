"""The code in CONTRIBUTING.md is run as it stands there, so that following it works."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import rankwise as rw
from rankwise import tasks
from rankwise.adapters import save
from rankwise.conformance.plugin import check_file
from rankwise.methods import base, build
from rankwise.named import load_plugin
from rankwise.optim import SimplexAdam
from rankwise.ranks import sites

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.large


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return BertForSequenceClassification(config)


@pytest.fixture
def method_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # so that the method is gone after the test
    monkeypatch.setattr(base.Method, "known", dict(base.Method.registry()))
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "grad_lora.py"
    file.write_text(blocks()[0])
    yield file
    sys.modules.pop(file.stem, None)


def test_the_method_of_the_walkthrough_trains_and_saves(method_file: Path, tmp_path: Path) -> None:
    load_plugin(method_file)
    method = build({"name": "grad-lora", "rank": 2, "targets": ["query", "value"], "at": 2})
    model = method.attach(tiny_bert(), head=["classifier"])
    budget = sum(site.parameters for site in sites(model))
    optimizer = SimplexAdam(method, model, lr=1e-2)
    tokens, labels = torch.randint(50, (4, 6)), torch.tensor([0, 1, 2, 0])
    pulls = dict.fromkeys([site.name for site in sites(model)], 0.0)
    for step in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        for site in sites(model) if step < 2 else ():
            pulls[site.name] += site.B.grad.norm().item()
        optimizer.step()

    ranks = {site.name: site.rank for site in sites(model)}
    assert len({*ranks.values()}) > 1 and sum(site.parameters for site in sites(model)) <= budget
    by_pull = [ranks[name] for name in sorted(pulls, key=pulls.__getitem__)]
    assert by_pull == sorted(by_pull)

    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=1e-5)
    assert not [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "pull" in name]


def test_the_method_of_the_walkthrough_keeps_every_promise(method_file: Path) -> None:
    found = list(check_file(method_file, ["rank=2", "at=3"]))
    assert len(found) > 30 and [str(each) for each in found if each.broken] == []


def test_the_method_of_the_walkthrough_is_compared(method_file: Path, tmp_path: Path) -> None:
    methods = [{"name": "lora", "rank": 2}, {"name": "grad-lora", "rank": 2, "at": 2}]
    experiment = {"task": "stdlib-kind", "model": "random-bert", "max_steps": 4, "train_rows": 64, "eval_rows": 16}
    experiment |= {"plugins": [str(method_file)], "vary": {"method": methods, "seed": [0]}}
    found = rw.compare(experiment, runs=tmp_path / "runs", jobs=2)
    assert found.code == 0 and {row.name for row in found.best} == {"lora", "grad-lora"}
    (ours,) = [row for row in found.best if row.name == "grad-lora"]
    assert 0 < ours.final <= ours.budget
    (folder,) = ours.folders.values()
    assert len({*json.loads((folder / "ranks.jsonl").read_text().splitlines()[-1])["ranks"].values()}) > 1


def test_the_task_of_the_walkthrough_has_rows_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.Task, "known", dict(tasks.Task.known))
    exec(compile(blocks()[1], "builtin_kind.py", "exec"), {"__name__": "walkthrough"})

    task = tasks.build("builtin-kind")
    train, (validation,) = task.train(), task.evaluation()
    assert len(train.data) > 80 and 20 < len(validation.data) < len(train.data)
    assert set(train.data["label"]) == {0, 1, 2}
    assert task.score(validation, validation.data["label"][:]) == {"accuracy": 1.0}
