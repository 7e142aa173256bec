"""Where runs are carried out: one file per runner, found by its name. A new runner is one new file here."""

import importlib
import pkgutil

from rankwise.bench.runners.base import Ended, Runner
from rankwise.config import InputError, nearest

__all__ = ["Ended", "Runner", "registry", "runner"]


def registry() -> dict[str, type[Runner]]:
    """Every runner by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(Runner.known.items()))


def runner(name: str) -> type[Runner]:
    """The runner called `name`. InputError for a name that nobody has."""
    known = registry()
    if name not in known:
        raise InputError(f"--runner {name}: there is no such runner{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]
