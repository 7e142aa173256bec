"""The tasks: one file each, found by name. A new task is one new file in this folder, nothing edited."""

import importlib
import pkgutil

from rankwise.config import InputError, nearest
from rankwise.tasks.base import Split, Task, encode, subset

__all__ = ["Split", "Task", "encode", "load", "registry", "subset"]


def registry() -> dict[str, type[Task]]:
    """Every task by its name (and every other name it goes by), sorted by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(Task.known.items()))


def load(name: str) -> Task:
    """The task called `name`. Its data is read when a split is asked for. InputError for a name nobody has."""
    known = registry()
    if name not in known:
        raise InputError(f"no task is called {name!r}; `rankwise tasks` lists them{nearest(name, known)}")
    return known[name]()
