import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import quick  # noqa: F401

hypothesis.settings.register_profile("any machine", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("any machine")
os.environ.setdefault("RANKWISE_TESTS", str(os.getpid()))  # of pytest itself: its workers inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts what it puts into the background with Ctrl-C ignored, and every process of a test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is loaded stays: the collections that every Trainer asks for need not go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Call the command line in this process; gives its exit code, stdout and stderr."""
    from rankwise.cli import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Unload after a test what plugins in its folder have registered."""
    from rankwise.methods.base import Method
    from rankwise.metrics import METRICS, classification
    from rankwise.tasks.base import Task

    for kind in (Method, Task):
        kind.registry()
        monkeypatch.setattr(kind, "known", dict(kind.known))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in METRICS if name.startswith("distance")]:
        del METRICS[name], classification.METRICS[name]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
