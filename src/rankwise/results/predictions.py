"""The answers of a run to each example of its main evaluation split, for the bootstrap over the examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rankwise.errors import need
from rankwise.files import check_regular

Kind = Literal["prediction", "score", "statistics"]
"""The column of predictions.parquet that a main metric is computed from."""


class Predictions(NamedTuple):
    """The answers of a run to the examples of its main evaluation split."""

    kind: Kind
    values: np.ndarray
    """Predictions or scores (n,), or statistics (n, k)."""
    labels: np.ndarray
    """(n,); the numbers of the examples where these are scores or statistics."""


def predictions(folder: Path) -> Predictions | None:
    """The answers of a finished run; None if they cannot be read or there are no labels to compare them with."""
    kinds: tuple[Kind, ...] = ("score", "statistics", "prediction")
    for kind in kinds:
        columns = main_split(folder, [kind, "label" if kind == "prediction" else "idx"])
        if columns is not None:
            try:
                values, labels = map(np.asarray, columns.values())
            except ValueError:  # of numpy, for statistics of uneven length
                return None
            return None if (labels == -1).all() else Predictions(kind, values, labels)
    return None


def main_split(folder: Path, columns: Sequence[str]) -> dict[str, list[Any]] | None:
    """`columns` of a run's predictions for the main split; None if they cannot be read or a column is missing."""
    try:
        file = need("pyarrow.parquet", "bench").ParquetFile(check_regular(folder / "predictions.parquet"))
        if not {"split", *columns} <= {*file.schema_arrow.names}:
            return None
        rows = file.read(columns=["split", *columns]).to_pydict()
    except (OSError, ValueError):  # pyarrow's errors are of these kinds
        return None
    main = [place for place, split in enumerate(rows["split"]) if split == rows["split"][0]]
    return {name: [rows[name][place] for place in main] for name in columns}
