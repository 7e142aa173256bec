"""What a run writes while it trains, and why it failed; checked on reading."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import InputError
from rankwise.files import MOST_LINES, read_json, read_text, remembered
from rankwise.runs.kinds import Count, Number, Text

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A line of `metrics.jsonl`: the first one, which counts the `steps` of the whole run, a loss, or an evaluation."""

    step: Count
    steps: Count | None = None
    epoch: Number | None = None
    loss: Number | None = None
    learning_rate: Number | None = None
    eval: Mapping[Text, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """A line of `ranks.jsonl`: the rank of every site, and during a search what decides the ranks."""

    step: Count
    ranks: Mapping[Text, Count]
    parameters: Count = 0
    weights: Mapping[Text, Number] | None = None


_STEP, _RANKS = TypeAdapter(Step), TypeAdapter(Ranks)


def damaged(path: Path, error: ValidationError) -> InputError:
    """The error for a file with content that does not belong there."""
    where = ".".join(map(str, error.errors()[0]["loc"]))
    return InputError(f"{path}: is damaged{f' at {where}' if where else ''}")


def course(folder: Path) -> list[Step]:
    """The lines of a run's `metrics.jsonl`, up to the first that is damaged."""
    return _lines(folder / "metrics.jsonl", _STEP)[0]


def rank_course(folder: Path) -> list[Ranks]:
    """The lines of a run's `ranks.jsonl`, up to the first that is damaged."""
    return _lines(folder / "ranks.jsonl", _RANKS)[0]


def progress(folder: Path) -> tuple[int, int | None]:
    """Steps done and steps of the whole run, from `metrics.jsonl`; (0, None) before its first line."""
    return remembered(_progress, folder / "metrics.jsonl")[:2]


def damage(folder: Path) -> str:
    """Which of the two files cannot be read to its end, in a few words; "" for none."""
    return remembered(_progress, folder / "metrics.jsonl")[2] or remembered(_rank_damage, folder / "ranks.jsonl")


def _progress(path: Path) -> tuple[int, int | None, str]:
    lines, damage = _lines(path, _STEP)
    steps = next((line.steps for line in lines if line.steps is not None), None)
    return max((line.step for line in lines), default=0), steps, damage


def _rank_damage(path: Path) -> str:
    return _lines(path, _RANKS)[1]


def error_lines(folder: Path) -> list[str]:
    """The lines of a run's error; none if the run has been started again meanwhile."""
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
    """Whether a loss, weight or score was no longer finite."""
    refused: bool = False
    """Whether the input of the run was wrong."""

    @property
    def lasting(self) -> bool:
        """Whether it would fail again unchanged."""
        return self.diverged or self.refused


def failure(folder: Path) -> Failure:
    """What `error.json` says; an empty `Failure` if it is missing or damaged."""
    try:
        found = read_json(folder / "error.json")
        return Failure(str(found["error"]), found["diverged"] is True, found["refused"] is True)
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        return Failure()


def _lines(path: Path, kind: TypeAdapter[T]) -> tuple[list[T], str]:
    """The lines up to the first damaged one, and which that is; without a last line that was cut off."""
    lines: list[T] = []
    try:
        texts = read_text(path, MOST_LINES).split("\n")[:-1]
    except FileNotFoundError:
        return lines, ""
    except InputError as error:
        return lines, str(error).replace(f"{path}:", f"{path.name}", 1)
    for number, text in enumerate(texts, 1):
        try:
            lines.append(kind.validate_python(json.loads(text)))
        except (ValueError, RecursionError):  # pydantic's error is a ValueError
            return lines, f"{path.name} is damaged in line {number}; what follows it is not shown"
    return lines, ""
