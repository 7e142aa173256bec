"""Adapters that every tool can load."""

from rankwise.adapters.save import load, save

__all__ = ["load", "save"]
