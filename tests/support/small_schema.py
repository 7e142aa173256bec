"""Settings against a schema of two methods and two tasks."""

import dataclasses
from typing import Any, ClassVar, Literal

from rankwise.errors import InputError
from rankwise.settings import Experiment, RunConfig, Schema, load


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A method with options of every kind."""

    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 8
    alpha: float = 16
    targets: str | tuple[str, ...] = "all-linear"
    rounding: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank = {self.rank}: expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Bare:
    """A method without options."""


@dataclasses.dataclass(frozen=True)
class Custom:
    """A task with an option."""

    protocol: Literal["official", "halves"] = "official"


SCHEMA = Schema({"lora": Adapter, "head": Bare}, {"cola": Bare, "mrpc": Custom})
SWEEP: dict[str, Any] = {
    "task": "cola",
    "vary": {
        "method": [{"name": "lora", "rank": 4, "learning_rate": [1e-3, 3e-3]}, {"name": "head", "learning_rate": 0.1}],
        "seed": [0, 1],
    },
}


def one(*overrides: str, **settings: Any) -> RunConfig:
    config = load({"task": "cola", **settings}, overrides, SCHEMA)
    assert isinstance(config, RunConfig)
    return config


def sweep(*overrides: str, **settings: Any) -> list[RunConfig]:
    experiment = load({**SWEEP, **settings}, overrides, SCHEMA)
    assert isinstance(experiment, Experiment)
    return list(experiment.configs)
