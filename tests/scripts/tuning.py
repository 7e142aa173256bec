"""A tuned experiment, stored as JSON, in a process of its own, with workers that stand in for the training.

`tuning.py EXPERIMENT RUNNER KEY=VALUE…`
"""

import json
import sys
from pathlib import Path

from rankwise.runs.store import Store
from rankwise.settings import Experiment
from rankwise.sweep.runners import runner
from rankwise.sweep.tune import tune_and_carry_out
from runs import REVISION

if __name__ == "__main__":
    experiment = Experiment.model_validate_json(sys.argv[1])
    store = Store(experiment.runs)
    worker = f"command=[{sys.executable}, {Path(__file__).with_name('worker.py')}]"
    outcome, folders = tune_and_carry_out(
        store,
        list(experiment.contests),
        lambda config: store.create(config, REVISION),
        runner(sys.argv[2], [worker, *sys.argv[3:]]),
    )
    print(json.dumps([[folder.name for folder in part] for part in (outcome.done, outcome.failed, folders)]))
