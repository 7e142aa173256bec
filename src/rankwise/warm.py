"""`python -m rankwise.warm`: imports what runs need and forks a process for each run that it is asked for.

That leaves out the seconds that each run would spend on the same imports. A forked process is what a fresh one would
be after these; where that is not certain, it becomes a fresh one.
"""

import ctypes
import gc
import importlib
import logging
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from rankwise.errors import InputError
from rankwise.processes.forked import announce, serve
from rankwise.terminal import plain_warning

ASKING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that are for runs. This process ends with the sweep."""
RESTARTED = {"jemalloc_bg_thd"}
"""Threads that a fork takes along: their library stops them for it and starts them again."""
IMPORTED = (
    *("datasets", "scipy.stats", "transformers.trainer"),
    *("rankwise.cli", "rankwise.api", "rankwise.sweep.plan", "rankwise.train.run"),
)
LOOK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Set to 1, it lets torch look for GPUs without CUDA, after which no fork could use them."""
NOT_INITIALISED = 3
"""What CUDA's driver answers before `cuInit`."""
DEVICES = ("nvidia-uvm", "kfd", "renderD")
"""How the files of GPUs begin that a process has open once it computes there."""


def main(first: Path) -> None:
    """`first` is the folder of the run that the first order will be for."""
    began, environment = time.time_ns(), dict(os.environ)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        owner = os.pidfd_open(int(environment["RANKWISE_PARENT"].partition(":")[0]))
    except ProcessLookupError:  # the sweep is gone already
        return
    orders = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    prepare(first)
    files = _stamps(_code())
    safe = _can_fork() and max(changed for changed, *_ in files.values()) < began
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()

    text, (log,), status = serve(orders, owner)
    os.setsid()
    said = os.pread(1, os.fstat(1).st_size, 0)  # what the imports have printed belongs to the log of each run
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    announce(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    command = ["train", os.fsdecode(text)]
    if not safe or _stamps(files) != files:
        os.execve(sys.executable, [sys.executable, "-m", "rankwise", *command], environment)
    with suppress(OSError):  # a full disk
        os.write(1, said)
    draw_anew()
    sys.argv[1:] = command
    runpy.run_module("rankwise", run_name="__main__", alter_sys=True)


def prepare(first: Path) -> None:
    """Import what a run needs, and read what is the same for all. Plugins are left to the runs, and so are models."""
    warnings.formatwarning = plain_warning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in a command
    given = os.environ.get(LOOK)
    os.environ[LOOK] = "1"
    for module in IMPORTED:
        with suppress(ImportError):  # of what is not installed; without the others there is no run
            importlib.import_module(module)
    from rankwise.methods import Method
    from rankwise.runs.code import code_of
    from rankwise.runs.store import Store
    from rankwise.tasks import Task
    from rankwise.train.run import run

    Method.ours()
    code_of(run)
    with suppress(InputError):  # which the run itself will say
        if task := Task.ours().get(Store(first.parent).config(first).task["name"]):
            task.prepare()
    os.environ.pop(LOOK) if given is None else os.environ.update({LOOK: given})


def draw_anew() -> None:
    """Seed what each process seeds by chance when it imports it: `datasets` names the files of its cache so.

    `random` does it by itself after a fork.
    """
    import numpy

    numpy.random.seed()
    if fingerprint := sys.modules.get("datasets.fingerprint"):
        fingerprint.fingerprint_rng.seed()


def _can_fork() -> bool:
    """Whether a fork has all that this process has: no thread is left behind, no GPU is in use."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of threads, which are looked at here
        pid = os.fork()
    if not pid:
        os._exit(torch.cuda._is_in_bad_fork())
    if os.waitpid(pid, 0)[1]:
        return False
    # only now: OpenBLAS ends its threads for a fork, and starts them again when it needs them
    others = [each for each in Path("/proc/self/task").iterdir() if each.name != str(os.getpid())]
    devices = [Path(os.path.realpath(each)).name for each in Path("/proc/self/fd").iterdir()]
    known = {(each / "comm").read_text().strip() for each in others} <= RESTARTED
    return known and not any(each.startswith(DEVICES) for each in devices) and _cuda_untouched()


def _cuda_untouched() -> bool:
    """Whether nothing has initialised CUDA's driver, with torch or without it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:  # is not loaded
        return True
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == NOT_INITIALISED


def _code() -> set[str]:
    """The files of what is loaded, and of all of rankwise."""
    loaded = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    return {*filter(None, loaded), *map(str, Path(__file__).parent.rglob("*.py"))}


def _stamps(files: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """By which a changed file is known."""
    found = {}
    for file in files:
        with suppress(OSError):
            now = Path(file).stat()
            found[file] = now.st_mtime_ns, now.st_size, now.st_ino
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
