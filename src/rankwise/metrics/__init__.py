"""Metrics, one file per family. A metric takes predictions and labels and returns plain floats."""
