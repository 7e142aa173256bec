"""What a folder of runs need not keep: runs that failed, that were stopped, or that its experiment does not ask for."""

import fcntl
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import InputError, nearest
from rankwise.files import checkpoints, opened, remove_checkpoint, tidy, unwritable, written
from rankwise.runs.standing import Standing
from rankwise.runs.store import BEGUN, LEFT, MEMORY, Store

KINDS = {
    "failed": "it failed",
    "stopped": "it was stopped",
    "foreign": "not asked for by the experiment that is here now",
}
"""Kind of a run that need not be kept -> why, in words."""
FILES = {*LEFT, *BEGUN, MEMORY, "maker.json", "masks.png", "sent.json", "written.json"}
PATTERNS = (".sent-*", "*.tsv")
"""Files of a run, `PATTERNS` those of a cluster's orders and of what leaderboards take."""
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "rankwise.json", "README.md"}
"""Files of a saved adapter."""


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
    """The runs of these kinds, of all when none is given. One that is at work is none of them.

    Neither is one whose rate made the training diverge: `tune:` has found that out, and would try it again.
    Raises InputError for another word than `failed`, `stopped` or `foreign`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--only {kind}: there is no such kind{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    found = []
    for folder in store.folders():
        standing = store.standing(folder)
        if standing.state == "running" or (standing.planned and standing.tries and store.failure(folder).diverged):
            continue
        kind = "foreign" if not standing.planned else standing.state
        if kind in (kinds or KINDS):
            found.append(Unneeded(standing, kind))
    return found


def remove(folder: Path) -> list[str]:
    """Delete what a run has written into its folder, and the folder where nothing else is in it; the names of what is.

    Raises InputError where the run is at work, and where nothing can be deleted.
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
    for checkpoint in checkpoints(folder):
        remove_checkpoint(checkpoint)
    tidy(folder)
    if model and not (folder / "model").is_symlink():
        shutil.rmtree(folder / "model", ignore_errors=True)
    ours = [folder / name for name in FILES] + [path for pattern in PATTERNS for path in folder.glob(pattern)]
    for path in [*ours, *(folder / "adapter" / name for name in ADAPTER)]:
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
    for place in (folder / "adapter", folder):
        with suppress(OSError):  # something else is in it
            place.rmdir()
    return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
