"""Adapters that every tool can load."""

from rankwise.export.save import load, save

__all__ = ["load", "save"]
