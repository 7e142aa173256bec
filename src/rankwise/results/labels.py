"""What tables call a method: its name, its rank, and whatever else tells it from others of its kind."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rankwise.runs.result import Finished

CHAIN = {"after", "followed"}
"""Settings that say where in a chain a run stands, and with which seed; what the stage is, its other settings say."""
_IN_COLUMNS = {"task", "method", "learning_rate", "seed", *CHAIN}
"""Settings that a row shows in columns of their own, or averages over."""


def labels(results: Sequence[Finished]) -> list[str]:
    """A label for each of what `Store.results` gives, equal for equal methods and settings."""
    identities = [_identity(result) for result in results]
    by_identity = {identity: _label(result, results) for identity, result in zip(identities, results, strict=True)}
    counts = Counter(by_identity.values())
    # stages that differ in nothing but the stages before them
    for identity, label in by_identity.items():
        if counts[label] > 1:
            by_identity[identity] = f"{label} chain={hashlib.sha256(identity.encode()).hexdigest()[:4]}"
    return [by_identity[identity] for identity in identities]


def natural(label: str) -> list[tuple[float, str]]:
    """For sorting: numbers by their size, so that sparsity=10.0 comes after sparsity=3.0."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]


def _identity(result: Finished) -> str:
    settings = {key: value for key, value in result.config.items() if key not in _IN_COLUMNS}
    return json.dumps([result.method, result.options, settings, result.lineage], sort_keys=True)


def _label(result: Finished, results: Sequence[Finished]) -> str:
    same_method = [other.options for other in results if other.method == result.method]
    size = "mean_rank" if "mean_rank" in result.options else "rank"
    configs = [other.config for other in results]
    budgets = {config.get("budget") for config in configs} - {None}
    parts = [
        (key, value)
        for key, value in result.options.items()
        if key == size or any(other.get(key, value) != value for other in same_method)
    ]
    if result.lineage or result.config.get("followed"):
        parts.append(("stage", len(result.lineage) + 1))
    parts += [
        (key, value)
        for key, value in result.config.items()
        if key not in _IN_COLUMNS
        and any(other.get(key) != value for other in configs)
        # a method without a size has no budget, which its name says
        and (key != "budget" or (value and len(budgets) > 1))
    ]
    return " ".join([result.method, *(f"{key}={_word(value)}" for key, value in parts)])


def _word(value: Any) -> str:
    if value is None:
        return "null"  # as it is written
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
