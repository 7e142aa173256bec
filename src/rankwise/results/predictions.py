"""The answers of a run to each example of its main evaluation split, for the bootstrap over the examples."""

from pathlib import Path
from typing import Literal, NamedTuple

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
    """The answers of a finished run; None where there are none to be read, or no labels to compare them with."""
    computed: tuple[Kind, ...] = ("score", "statistics")
    try:
        file = need("pyarrow.parquet", "bench").ParquetFile(check_regular(folder / "predictions.parquet"))
        kind: Kind = next((each for each in computed if each in file.schema_arrow.names), "prediction")
        table = file.read(columns=["split", kind, "label" if kind == "prediction" else "idx"])
        table = table.rename_columns(["split", "values", "labels"])  # an error where one is missing
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        main = [place for place, split in enumerate(columns["split"]) if split == columns["split"][0]]
        values, labels = (np.asarray([columns[name][place] for place in main]) for name in ("values", "labels"))
    except (OSError, ValueError, KeyError):  # pyarrow's errors are of these kinds, and numpy's for uneven statistics
        return None
    return None if (labels == -1).all() else Predictions(kind, values, labels)
