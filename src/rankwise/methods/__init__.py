"""The methods, one file each. To add one, add a file to this folder."""

from rankwise.methods.base import Method

__all__ = ["Method", "build", "registry"]

build, registry = Method.build, Method.registry
