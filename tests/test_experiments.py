"""Every experiment that is shipped loads, and compares what it says it compares."""

from pathlib import Path

import pytest

from rankwise import methods, tasks
from rankwise.config import Experiment, Schema, load
from rankwise.runs.grid import expand

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(methods.registry(), tasks.registry())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_experiment_loads_and_has_three_seeds(file: Path, schema: Schema) -> None:
    experiment = load(file, [], schema)
    assert isinstance(experiment, Experiment)
    runs = expand(experiment)
    assert len({config.seed for config in runs}) >= 3
    assert experiment.report["title"]


@pytest.mark.parametrize("name", ["quickstart", "glue_small", "methods_mrpc"])
def test_a_comparison_is_at_one_budget_and_tunes_each_method_alike(name: str, schema: Schema) -> None:
    runs = expand(load(next(file for file in FILES if file.stem == name), [], schema))  # type: ignore[arg-type]
    for method in ("lora", "simplex-lora"):
        assert {config.method["rank"] for config in runs if config.method["name"] == method} == {4}
    # as many rates for each, and every rate at every seed
    rates: dict[tuple[str, str], set[float]] = {}
    for config in runs:
        rates.setdefault((config.task["name"], config.method["name"]), set()).add(config.learning_rate)
    assert {len(each) for each in rates.values()} == {2}
    assert len(runs) == 2 * len(rates) * 3


def test_all_methods_are_compared(schema: Schema) -> None:
    runs = expand(load(next(file for file in FILES if file.stem == "methods_mrpc"), [], schema))  # type: ignore[arg-type]
    assert {config.method["name"] for config in runs} == set(schema.methods)


def test_the_quickstart_and_the_small_glue_are_shipped(schema: Schema) -> None:
    sizes = {file.stem: len(expand(load(file, [], schema))) for file in FILES}  # type: ignore[arg-type]
    assert sizes["quickstart"] == 18
    assert sizes["glue_small"] == 36
