"""A sweep on Ray: six runs, two at a time on this machine, or on every node of a cluster with address=auto."""

import sys

import rankwise as rw

EXPERIMENT = {
    "task": "stdlib-kind", "model": "random-bert", "train_rows": 960, "eval_rows": 128, "max_length": 24,
    "max_steps": 60, "learning_rate": 1e-2, "runs": "runs/sweep",
    "vary": {
        "seed": [0, 1, 2],
        "method": [{"name": "lora", "rank": 2}, {"name": "simplex-lora", "rank": 2, "every": 10, "times": 2}],
    },
}  # fmt: skip


if __name__ == "__main__":
    options = sys.argv[1:] or ["cpus=1", "jobs=2"]  # or address=auto cpus=4 gpus=0.5
    found = rw.compare(EXPERIMENT, runner="ray", options=options)
    print(len(found.outcome.done), "runs are done,", len(found.outcome.failed), "failed")
    print(found.table("csv", ["method", "accuracy"]))
    print(found.verdicts[0])
