"""Runs on disk: which there are, how they stand, what their results say. The folder is the state; no torch in here."""
