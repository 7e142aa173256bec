"""The files that a run writes about itself, checked before anyone relies on them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankwise.errors import InputError
from rankwise.files import MOST_LINES, read_json, read_text, remembered
from rankwise.runs.kinds import Count
from rankwise.settings import Published, read_yaml


class _Part(BaseModel):
    """A part of a file; other keys in it are ignored."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Step(_Part):
    """A line of `metrics.jsonl`."""

    step: Count
    steps: Count = 0
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    eval: dict[str, float] = Field(default_factory=dict)


class _Ranks(_Part):
    """A line of `ranks.jsonl`."""

    step: Count
    ranks: dict[str, Count]
    parameters: Count = 0
    weights: dict[str, float] | None = None


class _Method(_Part):
    name: str


class _Report(_Part):
    title: str = ""
    text: str = ""
    reference: _Method | None = None


class _Experiment(_Part):
    """What an `experiment.yaml` has to hold for a report to follow it."""

    report: _Report = Field(default_factory=_Report)
    published: Published | None = None


def experiment(path: Path) -> dict[str, Any]:
    """What an `experiment.yaml` says; {} where there is none. Raises InputError where it is damaged."""
    if not os.path.lexists(path):
        return {}
    try:
        content = read_yaml(path)
        _Experiment.model_validate(content)
    except ValidationError as error:
        raise damaged(path, error) from None
    return content


def damaged(path: Path, error: ValidationError) -> InputError:
    """The error of a file that holds something else than it should."""
    where = ".".join(map(str, error.errors()[0]["loc"]))
    return InputError(f"{path}: is damaged{f' at {where}' if where else ''}")


def course(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, up to the first that is damaged."""
    return _lines(folder / "metrics.jsonl", _Step)[0]


def rank_course(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `ranks.jsonl`, up to the first that is damaged."""
    return _lines(folder / "ranks.jsonl", _Ranks)[0]


def progress(folder: Path) -> tuple[int, int | None]:
    """Steps done and steps of the whole run, from `metrics.jsonl`; (0, None) before its first line."""
    return remembered(_progress, folder / "metrics.jsonl")[:2]


def damage(folder: Path) -> str:
    """What of the course of a run cannot be read, in a few words; "" for nothing."""
    return remembered(_progress, folder / "metrics.jsonl")[2] or remembered(_rank_damage, folder / "ranks.jsonl")


def _progress(path: Path) -> tuple[int, int | None, str]:
    lines, damage = _lines(path, _Step)
    steps = next((line["steps"] for line in lines if "steps" in line), None)
    return max((line["step"] for line in lines), default=0), steps, damage


def _rank_damage(path: Path) -> str:
    return _lines(path, _Ranks)[1]


def error_lines(folder: Path) -> list[str]:
    """The lines of a run's error; none where somebody has begun it again meanwhile."""
    try:
        return read_text(folder / "error.txt").strip().splitlines()
    except (OSError, InputError):
        return []


@dataclass(frozen=True)
class Failure:
    """Why a run has failed, as `error.json` says it."""

    error: str = ""
    """In one line."""
    diverged: bool = False
    """Whether loss, weights or scores were not finite any more."""
    refused: bool = False
    """Whether it was by what the run was given."""

    @property
    def lasting(self) -> bool:
        """Whether the run would fail again as it is."""
        return self.diverged or self.refused


def failure(folder: Path) -> Failure:
    """What `error.json` says; nothing where it is not there, or not what was written."""
    try:
        found = read_json(folder / "error.json")
        return Failure(str(found["error"]), found["diverged"] is True, found["refused"] is True)
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        return Failure()


def _lines(path: Path, kind: type[_Part]) -> tuple[list[dict[str, Any]], str]:
    """The lines up to the first that is damaged, and which that is. A line without an end was cut off, and is none."""
    found: list[dict[str, Any]] = []
    try:
        lines = read_text(path, MOST_LINES).split("\n")[:-1]
    except FileNotFoundError:
        return found, ""
    except InputError as error:
        return found, str(error).replace(f"{path}:", f"{path.name}", 1)
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            kind.model_validate(line)
        except (ValueError, RecursionError):  # pydantic's error is a ValueError
            return found, f"{path.name} is damaged in line {number}; what follows it is not shown"
        found.append(line)
    return found, ""
