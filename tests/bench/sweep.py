"""A sweep in a process of its own over the runs of one folder, with workers that stand in for the training.

`sweep.py RUNS RUNNER KEY=VALUE…`
"""

import sys
from pathlib import Path

from rankwise.bench import progress
from rankwise.bench.compare import carry_out
from rankwise.bench.runners import runner
from rankwise.bench.runners.slurm import Slurm
from rankwise.runs.store import Store

if __name__ == "__main__":
    Slurm.LOOK, progress.EVERY = 0.2, 1.0  # seconds
    store = Store(sys.argv[1])
    worker = f"command=[{sys.executable}, {Path(__file__).with_name('worker.py')}]"
    outcome = carry_out(store, store.folders(), runner(sys.argv[2], [worker, *sys.argv[3:]]))
    print(len(outcome.done), len(outcome.failed), len(outcome.stopped))
