"""What runs have answered, example by example."""

from pathlib import Path

import pytest

from rankwise.results.predictions import predictions
from rankwise.runs.store import Store
from runs import REVISION, config, predict


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_answers_are_those_of_the_main_split(store: Store) -> None:
    folder = store.create(config(), REVISION)
    assert predictions(folder) is None
    predict(folder, [1, 0, 1], [1, 1, 1])
    found = predictions(folder)
    assert found is not None and found.kind == "prediction"
    assert (found.values.tolist(), found.labels.tolist()) == ([1, 0, 1], [1, 1, 1])
    predict(folder, [1, 0, 1], [-1, -1, -1])
    assert predictions(folder) is None
    (folder / "predictions.parquet").write_bytes(b"PAR1")
    assert predictions(folder) is None


def test_answers_with_a_score_each_are_these_scores(store: Store) -> None:
    folder = store.create(config(), REVISION)
    predict(folder, [0, 0, 0], [-1, -1, -1], scores=[0.5, 0.25, 1.0])
    found = predictions(folder)
    assert found is not None and found.kind == "score"
    assert (found.values.tolist(), found.labels.tolist()) == ([0.5, 0.25, 1.0], [0, 1, 2])


def test_answers_with_statistics_are_these_row_by_row(store: Store) -> None:
    folder = store.create(config(), REVISION)
    predict(folder, [0, 0], [-1, -1], statistics=[[1, 2, 3], [4, 5, 6]], idx=[7, 3])
    found = predictions(folder)
    assert found is not None and found.kind == "statistics"
    assert (found.values.tolist(), found.labels.tolist()) == ([[1, 2, 3], [4, 5, 6]], [7, 3])
    predict(folder, [0, 0], [-1, -1], statistics=[[1, 2, 3], [4, 5]])
    assert predictions(folder) is None
