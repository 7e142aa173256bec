from collections.abc import Callable
from pathlib import Path

import pytest

from runs import write_runs


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path / "quickstart")


@pytest.fixture
def make() -> Callable[..., Path]:
    return write_runs
