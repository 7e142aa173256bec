"""Which process this is, of those that `accelerate launch` or `torchrun` started for one run. No torch in here."""

import os


class LostError(RuntimeError):
    """Another process of the same run has failed or ended, and tells why itself."""


def launched() -> int:
    """How many processes were started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files and prints; the only one, where nothing was launched."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"
