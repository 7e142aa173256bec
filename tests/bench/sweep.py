"""A sweep in a process of its own over the runs of one folder, with workers that stand in for the training."""

import sys
from pathlib import Path

from rankwise.bench.compare import carry_out
from rankwise.bench.runners.local import Local
from rankwise.runs.store import Store

if __name__ == "__main__":
    store = Store(sys.argv[1])
    worker = Path(__file__).with_name("worker.py")
    outcome = carry_out(store, store.folders(), Local(jobs=2, command=[sys.executable, str(worker)]))
    print(len(outcome.done), len(outcome.failed), len(outcome.stopped))
