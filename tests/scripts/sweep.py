"""A sweep in a process of its own over the runs of one folder, with workers that stand in for the training.

`sweep.py RUNS RUNNER KEY=VALUE…`
"""

import sys
from pathlib import Path

from rankwise.runs.store import Store
from rankwise.sweep import progress
from rankwise.sweep.compare import carry_out
from rankwise.sweep.runners import runner
from rankwise.sweep.runners.slurm import Slurm

if __name__ == "__main__":
    Slurm.LOOK, progress.EVERY = 0.2, 1.0  # seconds
    store = Store(sys.argv[1])
    worker = f"command=[{sys.executable}, {Path(__file__).with_name('worker.py')}]"
    outcome = carry_out(store, store.folders(), runner(sys.argv[2], [worker, *sys.argv[3:]]))
    print(len(outcome.done), len(outcome.failed), len(outcome.stopped))
