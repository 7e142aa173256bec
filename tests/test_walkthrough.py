"""The code in CONTRIBUTING.md is run as it stands there, so that following it works."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification

from rankwise import tasks
from rankwise.adapters import save
from rankwise.methods import base, build
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


def test_the_method_of_the_walkthrough_trains_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.Method, "known", dict(base.Method.known))  # the method is a guest, gone after the test
    exec(compile(blocks()[0], "deep_lora.py", "exec"), {"__name__": "walkthrough"})

    method = build({"name": "deep-lora", "rank": 2, "targets": ["query", "value"]})
    model = method.attach(tiny_bert(), head=["classifier"])
    budget = sum(site.parameters for site in sites(model))
    optimizer = SimplexAdam(method, model, lr=1e-2)
    tokens, labels = torch.randint(50, (4, 6)), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()

    ranks = [site.rank for site in sites(model)]
    assert ranks == sorted(ranks)
    assert ranks[0] < 2 < ranks[-1]
    assert sum(site.parameters for site in sites(model)) <= budget

    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=1e-5)


def test_the_task_of_the_walkthrough_has_rows_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.Task, "known", dict(tasks.Task.known))
    exec(compile(blocks()[1], "builtin_kind.py", "exec"), {"__name__": "walkthrough"})

    task = tasks.build("builtin-kind")
    train, (validation,) = task.train(), task.evaluation()
    assert len(train.data) > 80 and 20 < len(validation.data) < len(train.data)
    assert set(train.data["label"]) == {0, 1, 2}
    assert task.score(validation, validation.data["label"][:]) == {"accuracy": 1.0}
