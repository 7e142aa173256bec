import os

import pytest

from sweep_runs import SUPPORT


@pytest.fixture(autouse=True)
def workers_find_the_made_up_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
