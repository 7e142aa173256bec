"""From an experiment to its runs, and what a run is called."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from rankwise.settings import Experiment, RunConfig


def expand(experiment: Experiment, fit: Callable[[RunConfig], RunConfig] = lambda config: config) -> list[RunConfig]:
    """Every run of the experiment, once each, all of one seed before the next; `fit` is as for `Experiment.configs`.

    A sweep that is cut short so has compared everything at fewer seeds, instead of some methods not at all.
    Raises InputError for a combination of the axes that is no valid run.
    """
    runs: dict[str, RunConfig] = {}
    for config in experiment.configs(fit):
        runs.setdefault(config.digest(), config)
    return sorted(runs.values(), key=lambda config: config.seed)


def run_id(config: RunConfig) -> str:
    """12 hex digits that name a run by what was asked. What makes it is noted beside; where it is stored is not."""
    return config.digest()[:12]


def settings_digest(settings: Any) -> str:
    """64 hex digits for settings as they are written."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def is_id(name: str, settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> bool:
    """Whether `name` is that of a run with these settings as they are written; older ids hold version and data, too."""
    older = [settings, made_with["rankwise"], made_with["data"]]
    return name in (settings_digest(settings)[:12], settings_digest(older)[:12])
