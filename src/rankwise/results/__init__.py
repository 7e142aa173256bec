"""The results of finished runs: rows, statistics, notes, and ours next to the published ones. Does not import torch."""
