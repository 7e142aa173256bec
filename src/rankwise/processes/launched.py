"""Which process this is, of those that `accelerate launch` or `torchrun` started for one run. No torch in here."""

import os

from rankwise.errors import InputError

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for each process, besides WORLD_SIZE, how many there are."""


class LostError(RuntimeError):
    """Another process of the same run has failed or ended, and says why itself."""


def launched() -> int:
    """How many processes were started for this run. Ranks without WORLD_SIZE, or those of SLURM and MPI, say nothing.

    Raises:
        InputError: WORLD_SIZE says that there are several, and something that they need to meet is missing.
    """
    size, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    if size in ("", "0", "1"):
        return 1
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing or not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        unset = f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not set"
        but = unset if missing else f"RANK={rank} is not below it"
        raise InputError(
            f"WORLD_SIZE={size} in the environment says that this is one of several processes, but {but}: unset "
            "WORLD_SIZE to train in one, or start all by accelerate launch or torchrun"
        )
    return int(size)


def is_main() -> bool:
    """Whether this is the process that writes files and prints; the only one, if nothing was launched."""
    try:
        return launched() == 1 or os.environ["RANK"] == "0"
    except InputError:  # which the next call of `launched` raises
        return True
