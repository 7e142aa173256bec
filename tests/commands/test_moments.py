"""A cut on data loses least of what the layers put out there."""

import json

import pytest
import torch

import rankwise as rw
from rankwise.adapters.stored import stored
from rankwise.commands.ready import Ready
from rankwise.runs import run_file
from rankwise.tasks import subset
from rankwise.train.run import run
from runs import make


@pytest.fixture(
    scope="module", params=["bert", *(pytest.param(each, marks=pytest.mark.large) for each in ("gpt2", "t5"))]
)
def trained(request, tmp_path_factory):
    """A run on rows of several lengths: linear layers with a pooler, GPT-2's own kind of layer, encoder and decoder."""
    folder, settings = tmp_path_factory.mktemp("moments"), {}
    if request.param != "bert":
        rows = [
            {"text": f"word {row} " * (1 + row % 3), "target": f"answer {row} " * (1 + row % 4)} for row in range(60)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kind = "causal" if request.param == "gpt2" else "seq2seq"
        task = {"name": kind, "dataset": str(folder / "rows.jsonl")}
        settings = {"task": task, "model": f"random-{request.param}", "train_rows": 40, "eval_rows": 4}
    made = make(folder / "run", method={"name": "lora", "rank": 4, "targets": "all-linear"}, **settings)
    run(made)
    return made


def changes(trained, folder):
    """Of each layer what the adapter in `folder` adds in the training rows, one after another: (positions, out)."""
    ready = Ready.of(trained)
    split = subset(ready.task.train(), run_file.load(trained).config.train_rows)
    rows = list(ready.task.encode(split, ready.processor, ready.config.max_length))
    found, adapter = {}, stored(folder)
    names = stored(trained / "adapter").names

    def hook(name):
        def keep(layer, inputs):
            x = inputs[0].flatten(0, -2)
            if name in adapter.layers:
                new = adapter.factors(name)
                delta = new.scale * x.double() @ new.A.double().T @ new.B.double().T
            else:
                delta = torch.zeros(len(x), layer.out_features, dtype=torch.float64)
            found.setdefault(name, []).append(delta)

        return keep

    collate = ready.task.collate(ready.model, ready.processor, 0)
    for name in names:
        ready.model.get_submodule(f"base_model.model.{name}").register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in rows:
            ready.model(**collate([row]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def energy(changes):
    return {name: float(each.square().sum()) for name, each in changes.items()}


def test_what_is_lost_on_data_is_what_was_said_and_less_than_without_data(trained, tmp_path, cli):
    adapter = trained / "adapter"
    before = changes(trained, adapter)
    budget = sum(stored(adapter).rank(name) * stored(adapter).cost(name) for name in before) // 4
    plain = rw.resize_adapter(adapter, tmp_path / "plain", budget=budget)
    out, picture = tmp_path / "data", tmp_path / "ranks.svg"
    given = ("--budget", budget, "-o", out, "--data", trained, "--picture", picture, "--json")
    code, shown, log = cli("resize", adapter, *given)
    assert code == 0, log
    done = json.loads(shown)
    whole = energy(before)
    lost = {}
    for kind in ("plain", "data"):
        after = changes(trained, tmp_path / kind)
        lost[kind] = energy({name: before[name] - after[name] for name in before})
    for site in done["sites"]:
        assert lost["data"][site["site"]] / whole[site["site"]] == pytest.approx(site["loss"], abs=1e-4)
    assert sum(lost["data"].values()) / sum(whole.values()) == pytest.approx(done["loss"], abs=1e-5)
    assert sum(lost["data"].values()) < 0.99 * sum(lost["plain"].values())
    assert done["error"] > plain.error and done["on_data"]
    # Without writing it says the same.
    again = rw.resize_adapter(adapter, budget=budget, data=trained)
    assert again.loss == pytest.approx(done["loss"]) and again.error == pytest.approx(done["error"], abs=1e-5)
    assert "energy lost on data" in again.text()


def test_single_files_and_wrong_data_are_refused(trained, tmp_path, cli):
    from safetensors.torch import save_file

    file = tmp_path / "k.safetensors"
    save_file({"l.lora_down.weight": torch.ones(1, 8), "l.lora_up.weight": torch.ones(12, 1)}, file)
    code, _, log = cli("resize", file, "--rank", 1, "-o", tmp_path / "o.safetensors", "--data", trained)
    assert (
        code == 2
        and "is a single file, which PEFT does not load: give the folder of a PEFT adapter to cut it on data" in log
    )
    code, _, log = cli(
        "resize", trained / "adapter", "--rank", 1, "-o", tmp_path / "o", "--data", tmp_path / "none.yaml"
    )
    assert code == 2 and "none.yaml" in log and not (tmp_path / "o").exists()
