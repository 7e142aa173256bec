"""What a run tells TensorBoard, W&B, trackio and MLflow, besides what it writes into its own folder.

They get losses, learning rate and scores, the rank of each site, and a picture of the ranks. None of them can end a
run: `check` refuses what can be known before, and what fails later is said in one line, and the run goes on without it.

A run resumes at a checkpoint, and repeats the steps after it. TensorBoard drops these from what an earlier attempt has
written. The others cannot take back what they were sent, so there a resumed run is a new one, called NAME from step N.
"""

import fcntl
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from rankwise.errors import InputError
from rankwise.files import EVENTS, claim
from rankwise.pictures.heat import rank_picture
from rankwise.pictures.style import pixels
from rankwise.processes.launched import is_main
from rankwise.settings import PLACE, RunConfig, as_yaml, flattened

PICTURE = "ranks/picture"


@dataclass(frozen=True)
class _Attempt:
    """A run, from its start or from a checkpoint, as a reporter gets to know it."""

    folder: Path
    config: RunConfig
    step: int
    """The checkpoint that it resumes from; 0 at the start."""

    @property
    def project(self) -> str:
        """The folder of runs."""
        return self.folder.resolve().parent.name

    @property
    def name(self) -> str:
        return f"{self.folder.resolve().name} from step {self.step}" if self.step else self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """What is asked for, by dotted names such as `method.rank`."""
        return flattened(self.config.model_dump(mode="json", exclude={*PLACE, "tuned"}))


class _Reporter(Protocol):
    def __init__(self, attempt: _Attempt) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, image: np.ndarray, step: int) -> None:
        """`image` is (height, width, 3), in bytes."""

    def close(self, error: BaseException | None) -> None:
        """`error` is what ended the run; None if it is done."""


class _TensorBoard:
    def __init__(self, attempt: _Attempt) -> None:
        from torch.utils.tensorboard import SummaryWriter

        claim(attempt.folder, EVENTS)
        again = attempt.step + 1 if attempt.step else None  # the first step that an earlier attempt may have written
        self._writer = SummaryWriter(str(attempt.folder / EVENTS), purge_step=again)
        if not attempt.step:
            self._writer.add_text("settings", f"```\n{as_yaml(attempt.settings)}```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, image: np.ndarray, step: int) -> None:
        self._writer.add_image(PICTURE, image, step, dataformats="HWC")

    def close(self, error: BaseException | None) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, attempt: _Attempt) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", attempt.project),
            group=os.environ.get("WANDB_RUN_GROUP", attempt.folder.resolve().name),  # all attempts at one run
            name=os.environ.get("WANDB_NAME", attempt.name),
            config=attempt.settings,
            settings=wandb.Settings(console="off"),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, image: np.ndarray, step: int) -> None:
        self._run.log({PICTURE: self._image(image)}, step=step)

    def close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


class _Trackio:
    def __init__(self, attempt: _Attempt) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=attempt.project, name=attempt.name, config=attempt.settings, embed=False)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def picture(self, image: np.ndarray, step: int) -> None:
        self._trackio.log({PICTURE: self._trackio.Image(image)}, step=step)

    def close(self, error: BaseException | None) -> None:
        self._trackio.finish()


class _MLflow:
    MOST = 100
    """Metrics or parameters that MLflow takes at once."""

    def __init__(self, attempt: _Attempt) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric = Metric
        with _one_at_a_time(attempt.folder.resolve().parent):  # the first makes a database, where the second would fail
            self._client = mlflow.MlflowClient()
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", attempt.project))
        self._run = self._client.create_run(experiment.experiment_id, run_name=attempt.name).info.run_id
        settings = [Param(name, str(value)) for name, value in attempt.settings.items()]
        for start in range(0, len(settings), self.MOST):
            self._client.log_batch(self._run, params=settings[start : start + self.MOST])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 10**6  # milliseconds
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        for start in range(0, len(metrics), self.MOST):
            self._client.log_batch(self._run, metrics=metrics[start : start + self.MOST])

    def picture(self, image: np.ndarray, step: int) -> None:
        self._client.log_image(self._run, image, key=PICTURE, step=step)

    def close(self, error: BaseException | None) -> None:
        failed = "FAILED" if isinstance(error, Exception) else "KILLED"
        self._client.set_terminated(self._run, "FINISHED" if error is None else failed)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Around what the runs in a folder must not do at once."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


_KINDS: dict[str, type[_Reporter]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}
"""By the names in `report_to`, which are also those of their packages."""


def check(config: RunConfig) -> None:
    """Raise InputError for a reporter that is not installed, or for W&B without a login."""
    for name in config.report_to:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as W&B leaves, is no package
            raise InputError(f"report_to: {name} is not installed: pip install {name}")
    if "wandb" in config.report_to:
        import wandb

        try:
            ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
        except TypeError:  # an older W&B, which can only ask
            ready = True
        except wandb.Error as error:
            raise InputError(f"report_to: W&B: {' '.join(str(error).split())}") from None
        if not ready:
            raise InputError("report_to: W&B has no login: run `wandb login`, or set WANDB_MODE=offline")


class Reporters:
    """The reporters of a run, in its main process; none in the others. A context manager, which closes them."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._folder, self._config = folder, config
        self._live: dict[str, _Reporter] = {}
        self._ranks: Mapping[str, int] = {}
        self._drawn: Mapping[str, int] = {}

    def start(self, step: int, ranks: Mapping[str, int]) -> None:
        """Begin to report, after the checkpoint of this step, if any, with these ranks.

        Raises InputError if something else is where TensorBoard's files belong.
        """
        attempt = _Attempt(self._folder, self._config, step)
        for name in dict.fromkeys(self._config.report_to) if is_main() else ():
            with self._spared(name):
                self._live[name] = _KINDS[name](attempt)
        self._ranks = ranks
        if step and ranks:
            self._send(lambda each: each.scalars(rank_scalars(ranks), step), but="tensorboard")  # which has them

    def scalars(self, values: Mapping[str, float], step: int, kind: str) -> None:
        """Losses and rates (`kind` is train), or scores (eval)."""
        self._send(lambda each: each.scalars({f"{kind}/{name}": value for name, value in values.items()}, step))

    def ranks(self, ranks: Mapping[str, int], step: int) -> None:
        """The rank of each site, which has changed."""
        self._ranks = ranks
        if ranks:
            self._send(lambda each: each.scalars(rank_scalars(ranks), step))

    def picture(self, step: int) -> None:
        """Draw the ranks, if they have changed since this was last done."""
        if self._live and self._ranks and self._ranks != self._drawn:
            self._drawn = self._ranks
            title = f"Rank of every adapted weight after step {step}"
            image = functools.cache(lambda: pixels(rank_picture(self._drawn, title)))
            self._send(lambda each: each.picture(image(), step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._send(lambda each: each.close(error))

    def _send(self, do: Callable[[_Reporter], None], but: str = "") -> None:
        for name, reporter in [*self._live.items()]:
            if name != but:
                with self._spared(name):
                    do(reporter)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Around what a reporter does: it prints to stderr, and its failure is its own."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except InputError:
            raise
        except Exception as error:
            self._live.pop(name, None)
            why = " ".join(str(error).split()) or type(error).__name__
            print(f"report_to: {name} has failed, and the run goes on without it: {why[:300]}", file=sys.stderr)


def rank_scalars(ranks: Mapping[str, int]) -> dict[str, float]:
    """The rank of each site, by name, all of them together, and the number of sites that have none."""
    scalars = {"total": sum(ranks.values()), "empty": sum(not rank for rank in ranks.values()), **ranks}
    return {f"ranks/{name}": value for name, value in scalars.items()}
