"""Methods register themselves: every file of this folder is imported, every `class X(Method, name="x")` is one."""

import importlib
import pkgutil

from rankwise.methods.base import Method, build, registry

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "build", "registry"]
