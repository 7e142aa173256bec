"""`rankwise train FOLDER` where memory is short: `short_of_memory.py FOLDER GIB_PER_ROW`.

Each forward of a BERT takes that much address space for each of its rows, for a moment, and the process may have LIMIT
more than it begins with. What then fails is torch's own allocator.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification

import rankwise.train.run  # noqa: F401 - all that is loaded is there before memory gets short
from rankwise.cli import main

LIMIT = 15
GIB = 2**30


def hungry(gib: int) -> None:
    forward = BertForSequenceClassification.forward

    def greedy(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.empty(len(kwargs["input_ids"]) * gib * GIB, dtype=torch.uint8)
        return forward(self, *args, **kwargs)

    BertForSequenceClassification.forward = greedy


if __name__ == "__main__":
    _, folder, gib = sys.argv
    hungry(int(gib))
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT * GIB, now + LIMIT * GIB))
    sys.argv = ["rankwise", "train", folder]
    main()
