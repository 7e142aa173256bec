"""Runs on disk: which there are and how they stand. The folder is the state; no torch in here."""
