"""Every experiment that is shipped loads, and compares what it says it compares."""

from pathlib import Path

import pytest

from rankwise import methods, tasks
from rankwise.config import Experiment, Schema, load
from rankwise.runs.grid import expand

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(methods.registry(), set(tasks.registry()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_experiment_loads_and_has_three_seeds(file: Path, schema: Schema) -> None:
    experiment = load(file, [], schema)
    assert isinstance(experiment, Experiment)
    runs = expand(experiment)
    assert len({config.seed for config in runs}) >= 3
    assert experiment.report["title"]
    for name in ("lora", "simplex-lora"):
        assert {config.method["rank"] for config in runs if config.method["name"] == name} == {4}
    # tuned per method: as many rates for each, and every rate at every seed
    rates = {
        (config.task, config.method["name"]): {
            other.learning_rate
            for other in runs
            if (other.task, other.method["name"]) == (config.task, config.method["name"])
        }
        for config in runs
    }
    assert {len(each) for each in rates.values()} == {2}


def test_the_quickstart_and_the_small_glue_are_shipped(schema: Schema) -> None:
    sizes = {file.stem: len(expand(load(file, [], schema))) for file in FILES}  # type: ignore[arg-type]
    assert sizes["quickstart"] == 18
    assert sizes["glue_small"] == 36
