"""The command line on folders of runs in which something else lies where our files should be."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odd_files import ODD, a_pipe
from rankwise.cli import main
from rankwise.runs.store import Store
from rankwise.train.run import FILES
from reported_runs import finish
from runs_made_up import config, predict

Call = Callable[..., tuple[int, str, str]]

NAMES = sorted({*FILES, "run.yaml", "log.txt", "sent.json", "adapter", "model", "../experiment.yaml"})
"""Every file that a run folder may hold, and that of the folder above."""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command line in this process: its exit code, stdout and stderr."""
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


def whole(folder: Path) -> Path:
    """A finished run with every file that a report looks at, and one beside it; returns the first."""
    store = Store(folder)
    runs = [finish(store, config(task="stdlib-kind", seed=seed), 0.7) for seed in (0, 1)]
    for run in runs:
        predict(run, [0, 1, 1], [0, 1, 0])
    return runs[0]


@pytest.mark.timeout(100)
@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_whatever_lies_there_is_neither_waited_for_nor_a_traceback(place: int, call: Call, tmp_path: Path) -> None:
    for odd in ODD:
        run = whole(tmp_path / odd.__name__) / NAMES[place]
        run.unlink(missing_ok=True)
        odd(run)
        for command in ("status", "report"):
            code, out, err = call(command, tmp_path / odd.__name__)
            assert (code, err) == (0, "") and out or (code == 2 and err.count("\n") == 1), err
    page = ["report", tmp_path / ODD[place % len(ODD)].__name__, "--html", tmp_path / "page.html"]
    assert call(*page)[0] in (0, 2)
    assert call("train", tmp_path / a_pipe.__name__ / run.parent.name)[0] in (0, 2)
