"""What differs from the defaults comes first, and what differs from run to run has a column."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise import methods, tasks
from rankwise.settings import Schema, load, parse_yaml
from rankwise.sweep.changed import as_text, differing, dotted
from runs import config

Cli = Callable[..., tuple[int, str, str]]
ONE = {
    "task": "stdlib-kind",
    "model": "random-bert",
    "seed": 0,
    "epochs": 5,
    "method": {"name": "lora", "rank": 4, "alpha": 16},
}


def loaded(given: dict[str, Any]) -> Any:
    return load(given, [], Schema(methods.registry(), tasks.registry()))


def test_what_has_its_default_is_left_out() -> None:
    found = parse_yaml(as_text(loaded(ONE), everything=False))
    assert found == {
        "task": {"name": "stdlib-kind"},
        "model": "random-bert",
        "method": {"name": "lora", "rank": 4},
        "epochs": 5.0,
    }


def test_all_settings_are_there_on_request_the_changed_ones_first() -> None:
    settings = loaded(ONE)
    text = as_text(settings, everything=True)
    assert parse_yaml(text) == settings.model_dump(mode="json")
    changed, rest = text.split("\n# as by default\n")
    assert list(parse_yaml(changed)) == list(parse_yaml(as_text(settings, everything=False)))
    assert list(parse_yaml(changed)["method"])[:3] == ["name", "rank", "alpha"] and "seed: 0" in rest


def test_an_experiment_is_shown_in_the_same_way() -> None:
    vary = {
        "method": ["head", {"name": "lora", "rank": 8, "learning_rate": [1e-3]}, {"name": "sora", "rank": 4}],
        "seed": [0, 1],
    }
    given = {"task": "stdlib-kind", "epochs": 3.0, "warmup": 0.5, "vary": vary, "report": {"title": "T"}}
    settings = loaded(given)
    found = parse_yaml(as_text(settings, everything=False))
    assert found["base"] == {"task": {"name": "stdlib-kind"}, "warmup": 0.5}
    methods_found = [{"name": "head"}, {"name": "lora", "learning_rate": [1e-3]}, {"name": "sora", "rank": 4}]
    assert found["vary"] == {"method": methods_found, "seed": [0, 1]}
    assert found["report"] == {"title": "T"} and "chain" not in found
    assert parse_yaml(as_text(settings, everything=True)) == settings.model_dump(mode="json")


def test_a_chain_is_shown_in_the_same_way() -> None:
    chain = [{"method": "full", "epochs": 3.0}, {"method": {"name": "lora", "rank": 2}, "epochs": 1}]
    settings = loaded({"task": "stdlib-kind", "vary": {"seed": [0]}, "chain": chain})
    found = parse_yaml(as_text(settings, everything=False))
    assert found["chain"] == [{"method": {"name": "full"}}, {"method": {"name": "lora", "rank": 2}, "epochs": 1}]


def test_settings_differ_where_runs_that_have_them_do_not_agree() -> None:
    lora, head = config(), config(method={"name": "head"}, seed=1)
    assert differing([dotted(lora), dotted(head)]) == ["method", "seed"]  # an option of one method differs from none
    other = config(method={"name": "lora", "rank": 2}, learning_rate=0.5)
    assert "method.rank" in differing([dotted(lora), dotted(other)])
    assert "learning_rate" not in dotted(other)  # it has a column in any case
    assert differing([]) == differing([dotted(lora)]) == []


def test_a_plan_and_the_status_have_a_column_for_each_of_them(cli: Cli, tmp_path: Path) -> None:
    file, runs = tmp_path / "x.yaml", tmp_path / "runs"
    vary = {"method.rank": [2, 4], "batch_size": [8, 16], "seed": [0]}
    file.write_text(yaml.safe_dump({**ONE, "max_steps": 1, "max_length": 8, "vary": vary}))
    out = cli("compare", file, f"runs={runs}", "--dry-run")[1].splitlines()
    assert out[0].split() == ["run", "method", "learning", "rate", "seed", "method.rank", "batch_size", "state"]
    assert [line.split()[4:6] for line in out[2:]] == [["2", "8"], ["4", "8"], ["2", "16"], ["4", "16"]]
    everything = cli("compare", file, f"runs={runs}", "--dry-run", "--all")[1]
    assert "max_steps: 1" in everything and everything.splitlines()[:6] == out
    assert not runs.exists()


def test_validate_prints_what_differs_and_all_on_request(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump({**ONE, "max_length": 8}))
    code, out, err = cli("validate", file)
    assert (code, err) == (0, f"{file} is valid: one run\n")
    assert set(yaml.safe_load(out)) == {"task", "model", "method", "epochs", "max_length"}
    assert json.loads(cli("validate", file, "--json")[1]) == yaml.safe_load(cli("validate", file, "--all")[1])
    assert yaml.safe_load(cli("train", file, "--dry-run")[1]) == yaml.safe_load(out)
    assert "weight_decay" in cli("train", file, "--dry-run", "--all")[1]


@pytest.mark.parametrize("command", ["validate", "compare"])
def test_tuning_is_told_with_the_number_of_runs(command: str, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    tuned = {"tune": {"learning_rate": [1e-3, 1e-2]}, "vary": {"seed": [0, 1]}}
    file.write_text(yaml.safe_dump({**ONE, "max_length": 8, "train_rows": 64, **tuned}))
    err = cli(command, file, f"runs={tmp_path / 'runs'}", *(["--dry-run"] if command == "compare" else []))[2]
    words = {"validate": "an experiment of 2 runs, after those that choose their", "compare": "then 2 runs, each at"}
    assert words[command] in err
