"""From an experiment to its runs."""

from collections.abc import Callable

from rankwise.settings import Experiment, RunConfig


def expand(experiment: Experiment, fit: Callable[[RunConfig], RunConfig] = lambda config: config) -> list[RunConfig]:
    """Every run of the experiment, once each, all of one seed before the next; `fit` is as for `Experiment.configs`.

    A sweep that is cut short so has compared everything at fewer seeds, instead of some methods not at all.
    Raises InputError for a combination of the axes that is no valid run.
    """
    runs: dict[str, RunConfig] = {}
    for config in experiment.configs(fit):
        runs.setdefault(config.id, config)
    return sorted(runs.values(), key=lambda config: config.seed)
