"""What a folder of runs need not keep: runs that failed, were stopped, or are not part of its current experiment.

The latter may be finished, as after a change to the experiment or after another one in the same folder.
"""

import fcntl
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import InputError, nearest
from rankwise.files import (
    ADAPTER,
    WRITTEN,
    checkpoints,
    opened,
    remove_checkpoint,
    remove_events,
    tidy,
    unwritable,
    written,
)
from rankwise.runs.standing import FOREIGN, Standing
from rankwise.runs.store import FILES, LEFT, Store
from rankwise.sweep.runners.process import SENT, TOKEN

KINDS = {"failed": "it failed", "stopped": "it was stopped", "foreign": FOREIGN}
"""Kind of a run that need not be kept -> why, in words."""
SUBMISSION = b"index\tprediction\n"
"""First line of the .tsv files that `submission: true` of a GLUE task writes for the leaderboard."""


@dataclass(frozen=True)
class Unneeded:
    """A run that need not be kept."""

    standing: Standing
    kind: str
    """One of `KINDS`."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.standing.folder

    def row(self) -> list[str]:
        """Its name, how it stands, and why it need not be kept."""
        words = self.standing.error if self.kind == "failed" else ""
        return [self.folder.name, self.standing.state, words or KINDS[self.kind]]


def unneeded(store: Store, kinds: Sequence[str] = ()) -> list[Unneeded]:
    """The runs of these kinds, or of all kinds if none is given, except runs in progress and links to other folders.

    Trials that diverged are left out too: without them, `tune:` would try the same rates again.
    Raises InputError for a kind that is not in `KINDS`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--only {kind}: no such kind{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    runs = []
    for folder in store.folders():
        standing = store.standing(folder)
        diverged = standing.planned and standing.tries and store.failure(folder).diverged
        if folder.is_symlink() or standing.state == "running" or diverged:
            continue
        kind = "foreign" if not standing.planned else standing.state
        if kind in (kinds or KINDS):
            runs.append(Unneeded(standing, kind))
    return runs


def summary(runs: Sequence[Unneeded]) -> str:
    """How many runs these are, such as `2 unfinished runs and 1 finished run`."""
    finished = sum(each.standing.state == "done" for each in runs)
    counts = {"unfinished": len(runs) - finished, "finished": finished}
    return " and ".join(f"{n} {kind} run{'' if n == 1 else 's'}" for kind, n in counts.items() if n)


def remove(folder: Path) -> list[str]:
    """Delete the files that a run wrote, then its folder if it is empty. Returns the names of what is left in it.

    Raises InputError if the run is in progress, or if its files cannot be deleted.
    """
    try:
        with suppress(FileNotFoundError), opened(folder / "run.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _remove(folder)
        return _remove(folder)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is at work on this run; wait for it or end it") from None
    except OSError as error:
        raise unwritable(folder, error) from None


def _remove(folder: Path) -> list[str]:
    model = "model" in written(folder)
    remove_events(folder)
    for checkpoint in checkpoints(folder):
        remove_checkpoint(checkpoint)
    tidy(folder)
    if model and not (folder / "model").is_symlink():
        shutil.rmtree(folder / "model", ignore_errors=True)
    ours = [folder / name for name in (*LEFT, *FILES, SENT, WRITTEN)] + [*folder.glob(f"{TOKEN}*")]
    ours += [path for path in folder.glob("*.tsv") if _submission(path)]
    for path in [*ours, *(folder / "adapter" / name for name in ADAPTER)]:
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
    for place in (folder / "adapter", folder):
        with suppress(OSError):  # something else is in it
            place.rmdir()
    return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []


def _submission(path: Path) -> bool:
    with suppress(OSError, InputError), opened(path) as file:
        return file.read(len(SUBMISSION)) == SUBMISSION
    return False
