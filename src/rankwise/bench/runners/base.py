"""What a runner is: it starts runs, says which have ended, and can be told to stop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Ended:
    """A run's process that is over."""

    folder: Path
    code: int
    """Its exit code, negative for the number of the signal that killed it."""
    log_from: int = 0
    """Where in `log.txt` its output begins, in bytes; before it stands that of earlier tries."""

    @property
    def reason(self) -> str:
        """Why it ended, where the process could not say so itself."""
        if self.code >= 0:
            return f"the process ended with exit code {self.code}"
        killer = ", as the kernel does when memory runs out" if self.code == -9 else ""
        return f"the process was killed by signal {-self.code}{killer}"


class Runner(ABC):
    """Carries out runs, each as `rankwise train FOLDER` in a process that can crash without harm to the others.

    A subclass names itself: `class Local(Runner, name="local")`.
    """

    known: ClassVar[dict[str, type["Runner"]]] = {}

    def __init_subclass__(cls, name: str = "") -> None:
        super().__init_subclass__()
        if name:
            Runner.known[name] = cls

    def __init__(self, jobs: int) -> None:
        """Args:
        jobs: runs carried out at once.
        """
        self.jobs = jobs

    @abstractmethod
    def start(self, folder: Path) -> None:
        """Start the run in `folder` and return at once. Its output goes to `log.txt` in there."""

    @abstractmethod
    def running(self) -> list[Path]:
        """The folders of the runs that were started and have not been given out by `ended`."""

    @abstractmethod
    def ended(self) -> list[Ended]:
        """The runs that ended since this was asked last."""

    @abstractmethod
    def stop(self, grace: float) -> None:
        """Ask every run to write a checkpoint and end, wait up to `grace` seconds, then kill. None is left after it."""
