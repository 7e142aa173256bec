"""The settings of many runs: what they share, what differs between them, and how their learning rates are chosen."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from rankwise.errors import InputError, nearest
from rankwise.named import FARTHEST, LARGEST
from rankwise.settings.run import RunConfig, explain, named, put, run_config

MOST_RUNS = 10_000  # of an experiment, and of what its tuning tries
# Settings of a run that an entry of these axes may bring along for itself.
OWN = {"method": ("learning_rate", "warmup"), "task": ("epochs", "model")}


class Span(BaseModel):
    """All learning rates between two, equally likely on a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    low: float = Field(gt=0, le=FARTHEST)
    high: float = Field(gt=0, le=FARTHEST)

    @model_validator(mode="after")
    def _check(self) -> Span:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} must be below high = {self.high:g}")
        return self


Rates = tuple[float, ...] | Span


class Tune(BaseModel):
    """How the learning rate of each method is chosen, on rows that are not reported."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    learning_rate: Any = Field(
        default=None, description="rates to try, or {low, high}, between which Optuna chooses `trials` rates"
    )
    trials: int | None = Field(
        default=None, ge=1, le=MOST_RUNS, description="how many rates between low and high are tried"
    )
    at_once: int = Field(
        default=2, ge=1, le=MOST_RUNS, description="rates that Optuna gives before it hears what one of them is worth"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default_factory=lambda: [0], min_length=1, description="seeds at which rates are tried"
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="share of the training rows to choose by, where a task has no other rows; 0.1 if absent",
    )
    rows: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="in place of `share`: number of training rows to choose by that are not among `train_rows`",
    )

    @property
    def part(self) -> float:
        """The share of the training rows to choose by, or from 1 on the number of others."""
        return self.rows or self.share or 0.1

    def rates(self, own: Any = None, key: str = "tune.learning_rate") -> Rates:
        """The rates to try: a method's `own`, else those for all, of which `key` is what the user calls them.

        Raises InputError for what means no rates.
        """
        value = self.learning_rate if own is None else own
        if value is None:
            raise InputError(f"{key}: is missing; give rates to try, as in [1e-4, 1e-3], or {{low: 1e-5, high: 1e-2}}")
        try:
            if isinstance(value, Mapping):
                if self.trials is None:
                    raise InputError("tune.trials: is missing; say how many rates between low and high to try")
                if strange := [each for each in value if each not in Span.model_fields]:
                    hint = nearest(strange[0], Span.model_fields)
                    raise InputError(f"{key}.{strange[0]}: there is no such key{hint}; it has low and high")
                return Span.model_validate_json(json.dumps(value))
            kind = TypeAdapter(list[Annotated[float, Field(gt=0, le=FARTHEST, allow_inf_nan=False)]])
            listed = value if isinstance(value, list) else [value]
            found = kind.validate_json(json.dumps(listed), strict=True)
        except ValidationError as error:
            raise InputError(explain(error, key)) from None
        if not found:
            raise InputError(f"{key} = []: expected rates to try, as in [1e-4, 1e-3]")
        return tuple(sorted(set(found)))


@dataclasses.dataclass(frozen=True)
class Contest:
    """One combination of an experiment with `tune`, without its seed: the rates that compete for it."""

    settings: Mapping[str, Any]
    """Of a run, without rate and seed."""
    rates: Rates
    tune: Tune
    seeds: tuple[int, ...]
    """Of the runs that are reported."""

    @property
    def settled(self) -> bool:
        """Whether there is a single rate, which nothing need be tried for."""
        return isinstance(self.rates, tuple) and len(self.rates) == 1

    @property
    def lowest(self) -> float:
        """The lowest of the rates."""
        return self.rates.low if isinstance(self.rates, Span) else self.rates[0]

    def tried(self, rate: float) -> list[RunConfig]:
        """The runs that say what a rate is worth, one per seed of `tune`, scored on rows that are not reported."""
        own = {**self.settings, "learning_rate": rate, "tuning": self.tune.part}
        return [run_config({**own, "seed": seed}) for seed in self.tune.seeds]

    def reported(self, rate: float) -> list[RunConfig]:
        """The runs at the rate that was chosen; the rows to evaluate on are looked at once, at the end."""
        own = {**self.settings, "learning_rate": rate, "eval_every": 0, "tuned": not self.settled}
        return [run_config({**own, "seed": seed}) for seed in self.seeds]


class Published(BaseModel):
    """What of the papers an experiment is to stand beside.

    Attributes:
        tables: of `rankwise papers`, as `lora/e2e_gpt2_medium`.
        differs: what in the file is known not to be as in the paper, in words.
        changed: settings from the command line; `load` fills it in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tables: list[str] = Field(min_length=1, description="tables and figures of `rankwise papers`")
    differs: str = Field(default="", description="what is known not to be as in the paper")
    changed: list[str] = Field(default_factory=list, description="settings from the command line; written by rankwise")


class Experiment(BaseModel):
    """Many runs: what they share (`base`, fields of RunConfig) and what differs between them (`vary`).

    With `chain`, every combination is a chain of runs: each begins with what the one before has trained, under the
    settings of its stage and with a schedule of its own. With `tune`, the learning rate of every combination is chosen
    first, on rows that are not reported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    base: dict[str, Any]
    vary: dict[str, list[Any]]
    chain: list[dict[str, Any]] = Field(default_factory=list)
    tune: Tune | None = None
    report: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    published: Published | None = None
    runs: str

    @cached_property
    def configs(self) -> list[RunConfig]:
        """Every combination of the axes, the last axis fastest, each with its stages one after the other.

        A method of the axis `method` that brings its own `learning_rate: [..]` is run at those rates and no others.
        With `tune` these are the runs that are reported, at the lowest rate in place of the one yet to be chosen.
        The other settings in OWN that an entry brings replace the shared ones. Raises InputError for a combination that
        is no valid run, and for too many of them.
        """
        if self.tune is not None:
            return [config for contest in self.contests for config in contest.reported(contest.lowest)]
        found: list[RunConfig] = []
        for data in self._rated():
            before: RunConfig | None = None
            for place, stage in enumerate(self.chain or [{}]):
                settings = {**data, "followed": place < len(self.chain) - 1, "after": before and before.id}
                for key, value in stage.items():
                    put(settings, key, value)
                before = run_config(settings)
                found.append(before)
            _check_count(len(found))
        return found

    @cached_property
    def contests(self) -> list[Contest]:
        """Every combination of the axes except `seed`, with the rates to choose from; none without `tune`.

        Raises InputError for rates that are none, and for too many runs.
        """
        if self.tune is None:
            return []
        seeds = tuple(self.vary.get("seed", [self.base.get("seed", 0)]))
        found: list[Contest] = []
        count = 0
        for data, own in self._combinations({key: values for key, values in self.vary.items() if key != "seed"}):
            key = "tune.learning_rate" if own is None else f"learning_rate of {data['method'].get('name')}"
            rates = self.tune.rates(own, key)
            found.append(Contest(data, rates, self.tune, seeds))
            tried = self.tune.trials or 0 if isinstance(rates, Span) else len(rates)
            count += len(seeds) + tried * len(self.tune.seeds)
            _check_count(count)
        return found

    def _rated(self) -> Iterator[dict[str, Any]]:
        """The settings of every combination of the axes and of each method's own rates; a chain counts once."""
        for data, rates in self._combinations(self.vary):
            if rates is None:
                yield data
                continue
            if "learning_rate" in self.vary and data["learning_rate"] != self.vary["learning_rate"][0]:
                continue  # the method's own rates take the place of the axis: once, not once per value
            for rate in rates if isinstance(rates, list) else [rates]:
                yield {**data, "learning_rate": rate}

    def _combinations(self, axes: Mapping[str, list[Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
        """The settings of every combination of `axes`, and the rates that its method brings, if it does."""
        for values in itertools.product(*axes.values()):
            data: dict[str, Any] = {**self.base, "runs": self.runs}
            chosen = dict(zip(axes, values, strict=True))
            # the method first: `method.rank` then sets an option of the method just chosen
            for key in sorted(chosen, key=lambda key: key.count(".")):
                put(data, key, chosen[key])
            method = named("method", data.get("method", {"name": "lora"}))
            rates = method.pop("learning_rate", None)
            data["method"] = method
            for key in ("method", "task"):
                if data.get(key) is not None:
                    data[key] = part = named(key, data[key])
                    data |= {own: part.pop(own) for own in OWN[key] if own in part}
            yield data, rates


def _check_count(runs: int) -> None:
    """Refuse an experiment with so many runs that it would take forever to list them."""
    if runs > MOST_RUNS:
        raise InputError(
            f"vary: more than {MOST_RUNS:,} runs, the most that an experiment may have: leave out values, or split it"
        )
