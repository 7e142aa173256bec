"""The answers of a run to each example of its main evaluation split, for the bootstrap over the examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import need
from rankwise.files import check_regular
from rankwise.metrics.bootstrap import KINDS, Predictions


def predictions(folder: Path) -> Predictions | None:
    """The answers of a finished run; None if they cannot be read or there are no labels to compare them with."""
    for kind in KINDS:
        columns = main_split(folder, [kind, "label" if kind == "prediction" else "idx"])
        if columns is not None:
            return Predictions.of(columns)
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
