"""Runs as tasks of a Ray cluster, one that is there already or one that lasts as long as the sweep."""

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from rankwise.errors import STOPPED, InputError, need, require
from rankwise.files import unwritable
from rankwise.sweep.runners.base import Ended, Runner
from rankwise.sweep.runners.local import cores
from rankwise.sweep.runners.process import Order, Over, carry, logged, send

GRACE = 60.0
"""Seconds that a run has on its node for its last step and its checkpoint."""
MARGIN = 15.0
"""Seconds for a node to say that it has killed a run."""
STORE = 80 * 1024 * 1024  # bytes; nearly nothing passes through Ray's object store, and Ray wants this much


@dataclass(eq=False)
class Ray(Runner, name="ray"):
    """Tasks of a Ray cluster. A run whose node dies resumes on another one from its checkpoint.

    Attributes:
        address: of a cluster: HOST:PORT, or auto for the one started on this machine; when absent RAY_ADDRESS, and
            without that a cluster of only this machine, which ends with the sweep.
        cpus: CPUs of each run, also the most threads it starts.
        gpus: GPUs of each run; a part of one lets several runs share it.
        memory: GiB that Ray sets aside for each run.
    """

    address: str | None = None
    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    memory: float | None = None

    _ray: ModuleType = field(init=False)
    _live: dict[Any, Path] = field(default_factory=dict, init=False)
    _log_from: dict[Path, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory is None or self.memory > 0, f"memory must be above 0 GiB, not {self.memory}")
        self._ray = need("ray", "ray")

    def start(self, folder: Path) -> None:
        if not self._ray.is_initialized():
            self._connect()
        # absolute: a node's processes begin in folders of their own
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}  # Ray shows a task all GPUs where it gets none
        order = Order(folder.absolute(), self.command, max(1, math.floor(self.cpus)), GRACE, more=hidden)
        try:
            send(order)
        except OSError as error:
            raise unwritable(folder, error) from None
        self._log_from[folder] = logged(folder)
        task = self._ray.remote(carry).options(name=folder.name, max_retries=0, **self._resources())
        self._live[task.remote(order)] = folder

    def _resources(self) -> dict[str, float]:
        memory = {} if self.memory is None else {"memory": int(self.memory * 1024**3)}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory}

    def _connect(self) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        own = {"num_cpus": cores(), "object_store_memory": STORE, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces by its own
        try:
            _knock(address)
            self._ray.init(
                address,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                **(own if address == "local" else {}),
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"Ray cluster {address}: cannot be reached: {' '.join(str(error).split())}") from None
        finally:
            signal.signal(signal.SIGTERM, handler)
        self._check_room(address)

    def _check_room(self, address: str) -> None:
        """Say if no node is large enough for a run. A larger one may still join a cluster, but not a local one."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory or 0) * 1024**3}
        if any(_has(node["Resources"], wanted) for node in self._ray.nodes() if node["Alive"]):
            return
        request = ", ".join(f"{key}={value:g}" for key in ("cpus", "gpus", "memory") if (value := getattr(self, key)))
        if address == "local":
            self.close()
            raise InputError(f"this machine cannot provide {request} per run; request less")
        print(f"no node of the cluster can provide {request} per run; waiting for one that can", file=sys.stderr)

    def running(self) -> list[Path]:
        return list(self._live.values())

    def ended(self) -> list[Ended]:
        if not self._live:
            return []
        ready, _ = self._ray.wait(list(self._live), num_returns=len(self._live), timeout=0)
        return [self._outcome(task, self._live.pop(task)) for task in ready]

    def _outcome(self, task: Any, folder: Path) -> Ended:
        errors, log_from = self._ray.exceptions, self._log_from[folder]
        try:
            over: Over = self._ray.get(task)
        except errors.TaskCancelledError:
            return Ended(folder, STOPPED, log_from)
        except errors.OutOfMemoryError:
            return Ended(folder, -signal.SIGKILL, log_from)
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            last = str(error).strip().splitlines()[-1]
            raise InputError(f"{folder}: a node of the cluster cannot carry out runs: {last}") from None
        except errors.RayError as error:
            return Ended(folder, STOPPED, log_from, lost=f"its node or its worker there died ({type(error).__name__})")
        if over.problem:
            raise InputError(f"{folder}: node {over.node} {over.problem}")
        return Ended(folder, over.code, log_from)

    def stop(self, grace: float) -> None:
        tasks = list(self._live)
        for task in tasks:
            self._ray.cancel(task)
        _, left = self._ray.wait(tasks, num_returns=len(tasks), timeout=min(grace, GRACE) + MARGIN)
        for task in left:
            self._ray.cancel(task, force=True)

    def close(self) -> None:
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nothing answers there; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _has(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= least for name, least in wanted.items())
