"""The methods: one file each, found by name. A new method is one new file in this folder, nothing edited."""

from rankwise.methods.base import Method

__all__ = ["Method", "build", "registry"]

build, registry = Method.build, Method.registry
