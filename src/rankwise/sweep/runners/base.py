"""What a runner is: it starts runs, says which have ended, and stops them."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rankwise.errors import require
from rankwise.named import Named


@dataclass(frozen=True)
class Ended:
    """A run's process that is over."""

    folder: Path
    code: int
    """Its exit code, negative for the number of the signal that killed it."""
    log_from: int = 0
    """Where in `log.txt` its output begins, in bytes, after that of earlier tries."""
    lost: str = ""
    """Why the run has to start again although it was not stopped: its node died, its time was up."""

    @property
    def reason(self) -> str:
        """Why it ended, for a process that could not say so itself."""
        if self.lost:
            return self.lost
        if self.code >= 0:
            return f"the process ended with exit code {self.code}"
        killer = ", as the kernel does when memory runs out" if self.code == -9 else ""
        return f"the process was killed by signal {-self.code}{killer}"


@dataclass(eq=False)
class Runner(Named, ABC, kind="runner"):
    """Carries out runs, each as `rankwise train FOLDER` in a process that can crash without harming the others.

    A subclass names itself, `class Local(Runner, name="local")`, and is a dataclass whose fields are its options. What
    else a start needs, such as a connection, is fetched at the first `start`.

    Attributes:
        jobs: runs carried out at once; as many as there is room for when absent.
        command: what carries out a run; its folder is the last argument.
    """

    jobs: Annotated[int, Field(ge=1)] | None = None
    command: tuple[str, ...] = (sys.executable, "-m", "rankwise", "train")

    _kept: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.command = tuple(self.command)
        require(bool(self.command), "command must name a program, as in command=[python, -m, rankwise, train]")

    @property
    def full(self) -> bool:
        """Whether no further run is to be started now."""
        return self.jobs is not None and len(self.running()) >= self.jobs

    @abstractmethod
    def start(self, folder: Path) -> None:
        """Start the run in `folder` and return at once. Its output goes to `log.txt` there.

        Raises InputError if no run can be started like this.
        """

    @abstractmethod
    def running(self) -> list[Path]:
        """The folders of the runs that were started and not yet returned by `ended`; they may still be in a queue."""

    @abstractmethod
    def ended(self) -> list[Ended]:
        """The runs that ended since the last call. Raises InputError as `start` does, for what only shows later."""

    @abstractmethod
    def stop(self, grace: float) -> None:
        """Ask every run to write a checkpoint and end, wait up to `grace` seconds, then kill. None is left after it."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around starts; what they have fetched is released after the outermost of these blocks."""
        self._kept += 1
        try:
            yield
        finally:
            self._kept -= 1
            if not self._kept:
                self.close()

    def close(self) -> None:  # noqa: B027 - most runners hold nothing
        """Release what the starts have fetched; a later start fetches it again."""
