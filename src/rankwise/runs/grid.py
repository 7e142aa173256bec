"""From an experiment to its runs, and what a run is called."""

import hashlib
import json
from collections.abc import Callable

import rankwise
from rankwise.config import Experiment, RunConfig


def expand(experiment: Experiment, fit: Callable[[RunConfig], RunConfig] = lambda config: config) -> list[RunConfig]:
    """Every run of the experiment, once each, all of one seed before the next; `fit` is as for `Experiment.configs`.

    A sweep that is cut short so has compared everything at fewer seeds, instead of some methods not at all.
    Raises InputError for a combination of the axes that is no valid run.
    """
    runs: dict[str, RunConfig] = {}
    for config in experiment.configs(fit):
        runs.setdefault(config.digest(), config)
    return sorted(runs.values(), key=lambda config: config.seed)


def run_id(config: RunConfig, revision: str) -> str:
    """12 hex digits that name a run: its settings, the version of rankwise and the revision of its task's data.

    Where the run is stored is not part of it.
    """
    what = [config.model_dump(mode="json", exclude={"runs"}), rankwise.__version__, revision]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
