"""From an experiment to its runs."""

from collections.abc import Callable

from rankwise.settings import Experiment, RunConfig


def expand(experiment: Experiment, fit: Callable[[RunConfig], RunConfig] = lambda config: config) -> list[RunConfig]:
    """Every run of the experiment, once each, all of one seed before the next.

    So a sweep that is cut short has compared all methods at fewer seeds.
    `fit` completes a run whose size its budget has to choose; the next stage of a chain then begins with that.
    Raises InputError for a combination of the axes that is no valid run.
    """
    runs: dict[str, RunConfig] = {}
    fitted: dict[str | None, str] = {}
    for config in experiment.configs:
        run = fit(config.model_copy(update={"after": fitted.get(config.after)}))
        if config.followed:
            fitted[config.id] = run.id
        runs.setdefault(run.id, run)
    return sorted(runs.values(), key=lambda config: config.seed)
