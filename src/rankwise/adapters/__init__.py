"""Adapters: saved, loaded, and worked on without their model."""

from rankwise.adapters.save import load, save

__all__ = ["load", "save"]
