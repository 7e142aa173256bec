"""Stands in for `rankwise train FOLDER` where a sweep is tested and not the training: the same files, signals and exit
codes, in a fraction of a second. What it does is written in the run's `max_steps` and `train_rows`:

    train_rows 1: works until it is told to stop        2: fails with an error of its own
    3: is killed as by the kernel                       4: says something and ends with 1, writing no error.txt
    5: ignores SIGTERM and has a child that does, too   6: as 1 at first, and done where it finds a checkpoint
    else: done after `max_steps` steps

A rate above 0.1 diverges; below, the nearer it is to 0.001 the better the score, 0.5 at best.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock

from rankwise.runs.store import Store
from runs import result
from waiting import alive

folder = Path(sys.argv[1])
config = Store(folder.parent).config(folder)


def follow_parent() -> None:
    while alive(int(os.environ["RANKWISE_PARENT"].partition(":")[0])):
        time.sleep(0.05)
    os._exit(75)


def stop(*_: object) -> None:
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    sys.exit(75)


threading.Thread(target=follow_parent, daemon=True).start()
signal.signal(signal.SIGTERM, stop)
try:
    lock = filelock.FileLock(folder / "run.lock", timeout=0)
    lock.acquire()
except filelock.Timeout:
    sys.exit(2)
if Store(folder.parent).state(folder) == "done":
    sys.exit(0)
with (folder / "metrics.jsonl").open("a") as metrics:
    metrics.write(json.dumps({"step": 0, "steps": config.max_steps}) + "\n")
(folder / "started").open("a").write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
if config.train_rows == 1 or (config.train_rows == 6 and not (folder / "checkpoint-1").exists()):
    time.sleep(600)
if config.train_rows == 2:
    (folder / "error.txt").write_text("the loss is not finite\n\nTraceback\n")
    sys.exit(1)
if config.train_rows == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if config.train_rows == 4:
    print("something broke\n")
    sys.exit(1)
if config.train_rows == 5:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child").write_text(f"{child.pid}\n")
    time.sleep(600)
if config.learning_rate > 0.1:
    Store(folder.parent).note_error(folder, "loss is nan at step 1\n\nTraceback\n", diverged=True)
    sys.exit(1)
score = 0.5 - abs(math.log10(config.learning_rate / 1e-3)) / 10
(folder / "result.json").write_text(json.dumps(result(folder, config, score)))
