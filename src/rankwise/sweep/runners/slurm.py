"""Runs as jobs of a SLURM cluster, submitted by submitit."""

import getpass
import logging
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rankwise.errors import STOPPED, InputError, need, require
from rankwise.files import appended, unwritable
from rankwise.sweep.runners.base import Ended, Runner
from rankwise.sweep.runners.process import Order, Over, carry, logged, send, sent

MARGIN = 40.0
"""Seconds from `scancel` until a job has left the queue; SLURM itself waits 30 before it kills."""
NAME = "rankwise-"
"""How the names of our jobs begin; the mark of the order follows."""

Key = tuple[str, int | None]
"""The mark of an order, and its number in an array of jobs."""


@dataclass(eq=False)
class Slurm(Runner, name="slurm"):
    """Jobs of a SLURM cluster. One that is preempted or out of time is submitted again and goes on.

    Attributes:
        partition: of the cluster; the cluster's own choice when absent.
        account: that the time is charged to.
        qos: quality of service.
        time: minutes that a job may take; a run that needs more takes several jobs, one after another.
        cpus: CPUs of each run, also the most threads it starts.
        gpus: GPUs of each run.
        memory: GiB of each run.
        array: submit what waits as one array of jobs instead of as many jobs.
        notice: seconds before the end of its time at which a run is asked for its checkpoint.
        setup: lines of shell in each job before the run, as in setup=[module load cuda].
        sbatch: any other options of sbatch, as in sbatch={constraint: a100}.
        executor: debug carries out the jobs on this machine, one after another, to try things without a cluster.
    """

    LOOK: ClassVar[float] = 10.0
    """Seconds between two questions to the queue."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Annotated[int, Field(ge=1)] = 240
    cpus: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    memory: float | None = None
    array: bool = False
    notice: Annotated[int, Field(ge=10)] = 120
    setup: tuple[str, ...] = ()
    sbatch: dict[str, str | int | float | bool] = field(default_factory=dict)
    executor: Literal["slurm", "debug"] = "slurm"

    _submitit: ModuleType = field(init=False)
    _new: dict[Path, Order] = field(default_factory=dict, init=False)
    """To be submitted, or to be found in the queue, when the runs that have ended are asked for next."""
    _live: dict[Path, Any] = field(default_factory=dict, init=False)
    """The job of each run."""
    _log_from: dict[Path, int] = field(default_factory=dict, init=False)
    _missed: set[Path] = field(default_factory=set, init=False)
    """Runs whose job was no longer in the queue at the last look, and whose result may still be on its way."""
    _checked: float = field(default=-1e9, init=False)
    _looked: float = field(default=-1e9, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory is None or self.memory > 0, f"memory must be above 0 GiB, not {self.memory}")
        limit = f"notice must be less than the {self.time} min of a job, not {self.notice} s"
        require(self.notice < 60 * self.time, limit)
        self.setup = tuple(self.setup)
        self._submitit = need("submitit", "slurm")
        logging.getLogger("submitit").setLevel(logging.CRITICAL)  # it would log to stdout

    def start(self, folder: Path) -> None:
        # absolute: a job need not begin where we are
        self._new[folder] = Order(folder.absolute(), self.command, self.cpus, grace=max(5.0, self.notice - 30.0))
        self._log_from[folder] = logged(folder)

    def running(self) -> list[Path]:
        return [*self._live, *self._new]

    def ended(self) -> list[Ended]:
        self._submit()
        return [self._outcome(folder, self._live.pop(folder)) for folder in self._over()]

    def _over(self) -> list[Path]:
        """Runs whose job is over: those with a result, and those whose job has left the queue without one."""
        if self.executor == "debug":
            return [folder for folder, job in list(self._live.items())[:1] if job.done()]  # carries it out
        now = time.monotonic()
        if now - self._checked < min(2.0, self.LOOK):
            return []
        self._checked = now
        over = [folder for folder, job in self._live.items() if job.paths.result_pickle.exists()]
        if now - self._looked >= self.LOOK and len(over) < len(self._live):
            self._looked = now
            over += [folder for folder in self._gone() if folder not in over]
        return over

    def _gone(self) -> list[Path]:
        """Runs whose job was in the queue neither at this look nor at the one before: no result is on its way."""
        try:
            queue = self._queue()
        except InputError:
            return []  # the controller may be down for a while; the jobs go on
        missing = {folder for folder in self._live if _key(folder) not in queue}
        gone, self._missed = missing & self._missed, missing - self._missed
        return sorted(gone)

    def _submit(self) -> None:
        """Submit what is new, except runs whose job a killed sweep has left in the queue."""
        new, self._new = self._new, {}
        if self.executor == "slurm" and any(_key(folder) for folder in new):
            queue = self._queue()
            for folder in list(new):
                name = queue.get(_key(folder) or ("", None))
                if name is None:
                    continue
                job = self._submitit.SlurmJob(self._folder(folder), name)
                if job.paths.submitted_pickle.exists():
                    self._live[folder] = job
                    del new[folder]
                else:  # the sweep was killed while submitting: the job would not find what it is to do
                    _scancel(name)
        if self.array and new:
            self._submit_batch(new)
        for folder, order in new.items() if not self.array else ():
            self._submit_batch({folder: order})

    def _submit_batch(self, orders: dict[Path, Order]) -> None:
        mark = next(iter(orders.values())).mark
        sending = [replace(order, mark=mark) for order in orders.values()]
        executor = self._executor(sending)
        for place, order in enumerate(sending):
            try:
                # before the job exists, so that a kill in between leaves a job that can be found
                send(order, place if len(orders) > 1 else None)
            except OSError as error:
                raise unwritable(order.folder, error) from None
        errors = self._submitit.core.utils
        try:
            jobs = executor.map_array(carry, sending)
        except (OSError, errors.FailedJobError, errors.FailedSubmissionError) as error:
            raise InputError(f"sbatch did not take the job: {' '.join(str(error).split())}") from None
        self._live.update(zip(orders, jobs, strict=True))

    def _executor(self, orders: list[Order]) -> Any:
        try:
            executor = self._submitit.AutoExecutor(self._folder(orders[0].folder), cluster=self.executor)
        except RuntimeError:
            raise InputError("srun is not on the PATH: --runner slurm works where jobs can be submitted") from None
        executor.update_parameters(
            name=f"{NAME}{orders[0].mark}",
            nodes=1,
            tasks_per_node=1,
            timeout_min=self.time,
            cpus_per_task=self.cpus,
            gpus_per_node=self.gpus or None,
            mem_gb=self.memory,
            slurm_partition=self.partition,
            slurm_account=self.account,
            slurm_qos=self.qos,
            slurm_signal_delay_s=self.notice,
            slurm_setup=list(self.setup) or None,
            slurm_stderr_to_stdout=True,
            slurm_array_parallelism=self.jobs,
            # The sweep decides what starts again, not the cluster.
            slurm_additional_parameters={"no-requeue": True, **self.sbatch},
        )
        return executor

    @staticmethod
    def _folder(run: Path) -> Path:
        """Where submitit keeps its scripts and results."""
        return run.parent / ".slurm"

    def _queue(self) -> dict[Key, str]:
        """The id of each of our jobs that waits or runs. Raises InputError where the queue does not answer."""
        command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%K|%j"]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        except (OSError, subprocess.SubprocessError) as error:
            reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
            raise InputError(f"squeue does not answer, so which runs are in the queue is unknown: {reason}") from None
        jobs = {}
        for job, place, name in (line.strip().split("|", 2) for line in lines if line.count("|") >= 2):
            if name.startswith(NAME):
                jobs[name.removeprefix(NAME), int(place) if place.isdigit() else None] = job
        return jobs

    def _outcome(self, folder: Path, job: Any) -> Ended:
        log_from = self._log_from[folder]
        if self.executor == "slurm" and not job.paths.result_pickle.exists():
            return self._ended_as(folder, job, log_from)
        try:
            over: Over = job.result()
        except self._submitit.core.utils.FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line[:1].strip("- ")]
            last = next(iter(lines[-2:]), "")  # of a traceback, before a line on submitit's own logs
            raise InputError(f"{folder}: a node of the cluster cannot carry out runs: {last}") from None
        if over.problem:
            raise InputError(f"{folder}: node {over.node} {over.problem}")
        if over.signal == signal.SIGUSR2:
            return Ended(folder, over.code, log_from, lost=f"the time of its job {job.job_id} was up")
        if over.signal == signal.SIGTERM and not self._state(job).startswith("CANCELLED"):
            return Ended(folder, over.code, log_from, lost=f"its job {job.job_id} had to make room")
        if over.code == 0:
            for path in self._folder(folder).glob(f"{job.job_id}_*"):
                path.unlink(missing_ok=True)
        return Ended(folder, over.code, log_from)

    def _ended_as(self, folder: Path, job: Any, log_from: int) -> Ended:
        """The end of a job that has left no result, by what the accounting says."""
        state = self._state(job)
        if state.startswith("CANCELLED"):
            return Ended(folder, STOPPED, log_from)
        if state.startswith("OUT_OF_ME"):
            return Ended(folder, -signal.SIGKILL, log_from)
        if state == "FAILED":
            with suppress(OSError, InputError), appended(folder / "log.txt") as log:
                log.write(job.paths.stdout.read_bytes()[-10_000:])
            return Ended(folder, 1, log_from)
        return Ended(folder, STOPPED, log_from, lost=f"its job {job.job_id} ended without a result ({state})")

    def _state(self, job: Any) -> str:
        return str(job.state if self.executor == "debug" else job.watcher.get_state(job.job_id, mode="force"))

    def stop(self, grace: float) -> None:
        self._new.clear()
        if self.executor == "debug":
            self._live.clear()  # none of them has begun
        jobs = {folder: job.job_id for folder, job in self._live.items()}
        if not jobs:
            return
        try:
            _scancel("--state=PENDING", *jobs.values())
            _scancel("--signal=TERM", *jobs.values())
            self._wait_for_all(grace)
        finally:
            _scancel(*jobs.values())
        self._wait_for_all(MARGIN)

    def _wait_for_all(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(InputError):
                queue = self._queue()
                if not any(_key(folder) in queue for folder in self._live):
                    return
            time.sleep(min(1.0, self.LOOK))


def _key(folder: Path) -> Key | None:
    order = sent(folder)
    return (str(order["mark"]), order.get("index")) if "mark" in order else None


def _scancel(*arguments: str) -> None:
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["scancel", *arguments], capture_output=True, timeout=60)
