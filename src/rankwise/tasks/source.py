"""Where rows come from: a file for each split, or a dataset on the hub; and the checks for rows of all tasks.

`read` reads one split, from a folder or the hub; `Origin` is a published dataset, which may be in both. Neither checks
columns. `checked` does, and reports the file and row of the first error.

A folder holds `train.parquet`, `train.csv`, `train.jsonl` or `train.json`, and the same for its other splits. CSV is
UTF-8 with a header line and commas (or the semicolons or tabs of spreadsheets, if the header has those and no comma),
and all fields are text until `checked` casts them; an empty field is an empty text. JSONL is UTF-8 with one object per
line, JSON a list of objects; a missing key is a null. Rows count from 0, lines of a file from 1.
"""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rankwise.errors import InputError, nearest, need
from rankwise.files import check_regular, opened, similar
from rankwise.tasks.base import Split
from rankwise.tasks.records import Csv, json_object, jsonl, lines, one_line

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".csv", ".jsonl", ".json")
AGAIN = "fetch the file again"
MEND = "correct it or leave it out"


@dataclass(frozen=True)
class Rows:
    """One split as it was read, before any check.

    Attributes:
        table: all columns of the file.
        split: its name, which ends in `_subset` if such a file replaced it.
        where: its name in messages.
        remedy: what to do if something is wrong with it, for messages.
        unit: what messages count, `row` or `line`.
        numbers: the number of each row; None if they are 0, 1, 2 and so on.
        mixed: what is wrong with each column that has values of several types, which the table has as JSON.
    """

    table: "pa.Table"
    split: str
    where: str
    remedy: str = AGAIN
    unit: str = "row"
    numbers: Sequence[int] | None = None
    mixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def counted(self) -> Sequence[int]:
        """The number of each row of the table in messages."""
        return range(self.table.num_rows) if self.numbers is None else self.numbers

    def at(self, row: int) -> str:
        """The name of row `row` of the table in messages."""
        return f"{self.unit} {self.counted[row]}"

    def take(self, rows: Sequence[int]) -> "Rows":
        """Some of the rows, with the same numbers in messages."""
        numbers = rows if self.numbers is None else [self.numbers[row] for row in rows]
        return replace(self, table=self.table.take(rows), numbers=numbers)

    def without_blanks(self, *columns: str) -> "Rows":
        """The rows in which none of these text columns is blank; columns that the table does not have are ignored."""
        pa = need("pyarrow", "bench")
        compute = need("pyarrow.compute", "bench")
        keep = list(range(self.table.num_rows))
        for column in columns:
            if column not in self.table.column_names:
                continue
            kind = self.table.schema.field(column).type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                text = compute.fill_null(compute.utf8_trim_whitespace(self.table[column]), "")
                filled = compute.not_equal(text, "").to_pylist()
                keep = [row for row in keep if filled[row]]
        return self if len(keep) == self.table.num_rows else self.take(keep)

    def note(self, split: str, official: int, count: int | None = None) -> str:
        """Why these are not the `official` rows of `split`; "" if they are. `count` is the number of those in use."""
        count = self.table.num_rows if count is None else count
        if self.split == split and count == official:
            return ""
        return f"{self.split}: {count:,} rows, not the official {official:,} of {split}"


@dataclass(frozen=True)
class Origin:
    """A published dataset, in the folder RANKWISE_DATA if that variable is set, else on the hub.

    Attributes:
        title: its name in messages.
        folder: its path in RANKWISE_DATA; a file `<split>_subset` there replaces a missing `<split>`.
        hub: its name on the hub; empty if it is not there.
        name: its configuration on the hub.
        revision: its branch on the hub.
        files: the data file of each split, if the hub has files without splits.
    """

    title: str
    folder: str
    hub: str
    name: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None

    def read(self, split: str) -> Rows:
        """The rows of `split`, whose columns are not checked yet. InputError if they cannot be read."""
        example = f"{self.folder}/{split}.parquet"
        root = os.environ.get("RANKWISE_DATA")
        if root:
            if not Path(root).is_dir():
                raise InputError(
                    f"RANKWISE_DATA={root!r} is not a folder: set it to one that holds {example}, "
                    f"or unset it to take {self.title} from the hub"
                )
            return _from_folder(
                Path(root, self.folder),
                (split, f"{split}_subset"),
                "put it there, or unset RANKWISE_DATA to use the hub",
            )
        if not self.hub:
            raise InputError(f"{self.title} is not on the hub: set RANKWISE_DATA to a folder that holds {example}")
        remedy = f"go online, or set RANKWISE_DATA to a folder that holds {example}"
        file = None if self.files is None else self.files[split]
        return _from_hub(self.hub, split, remedy, self.name, revision=self.revision, data_files=file)


def read(dataset: str, split: str, texts: Collection[str] | None = None) -> Rows:
    """The rows of `split` of a user's dataset: a folder, a file, or a name on the hub.

    Relative paths start at the working directory. A file has no splits: all its rows are returned for any `split`.
    If `texts` are given, lists and objects in JSON files are kept as text, except in these columns: as values of a
    table they would need one type in all rows.
    InputError if the rows cannot be read.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return replace(_from_folder(path, (split,), "the dataset needs a file for each split", texts), remedy=MEND)
    if path.is_file() and path.suffix in ENDINGS:
        return replace(_from_file(path, split, texts), remedy=MEND)
    if path.exists() or path.is_absolute() or dataset.startswith((".", "~")) or path.suffix in ENDINGS:
        if not path.exists():
            raise InputError(f"dataset: {dataset}: there is no such file or folder{similar(path)}")
        endings = " or ".join(ENDINGS)
        raise InputError(f"dataset: {dataset} is neither a folder nor a file whose name ends in {endings}")
    return _from_hub(dataset, split, "go online, or give a folder or a file")


def checked(rows: Rows, types: Mapping[str, Any], filled: Sequence[str] = ()) -> "pa.Table":
    """The columns `types` of `rows`, cast to these pyarrow types; None keeps a column's own.

    InputError, with file and row, for a missing column, no rows, a null, a value of another type, values of several
    types, and in the columns `filled` a blank text, alone or in a list, or an empty list.
    """
    pa = need("pyarrow", "bench")
    compute = need("pyarrow.compute", "bench")
    table = rows.table
    if table.num_rows == 0:
        raise InputError(f"{rows.where} has no rows: {rows.remedy}")
    for column in types:
        if table.column_names.count(column) > 1:
            raise InputError(f"{rows.where} has the column {column!r} twice: rename one")
        if column not in table.column_names:
            names = ", ".join(table.column_names) + nearest(column, table.column_names)
            remedy = "name another" if rows.remedy == MEND else rows.remedy
            raise InputError(f"{rows.where} has no column {column!r}, only {names}: {remedy}")
        if column in rows.mixed:
            raise InputError(rows.mixed[column])
        if alike := [name for name in table.column_names if name != column and folded(name) == folded(column)]:
            raise InputError(f"{rows.where} has the columns {column!a} and {alike[0]!a}, which look alike: rename one")
    columns = {}
    for column, kind in types.items():
        values = table[column]
        if values.null_count:
            row = compute.index(values.is_null(), True).as_py()
            raise InputError(f"{rows.where} has no {column} in {rows.at(row)}: {rows.remedy}")
        if kind is not None:
            try:
                values = values.cast(kind)
            except pa.ArrowException as error:
                raise InputError(_wrong_type(rows, column, kind, error)) from error
        if column in filled:
            row = next((row for row, value in enumerate(values.to_pylist()) if not _filled(value)), None)
            if row is not None:
                raise InputError(f"{rows.where} has an empty {column} in {rows.at(row)}: {rows.remedy}")
        columns[column] = values
    return pa.table(columns)


def own_split(rows: Rows, table: "pa.Table") -> Split:
    """A user's rows, all of them: `table` has them in the columns of a family."""
    pa = need("pyarrow", "bench")
    columns = {"number": pa.array(rows.counted, pa.int64()), "idx": pa.array(range(table.num_rows), pa.int64())}
    for name, values in columns.items():
        table = table.append_column(name, values)
    data = need("datasets", "bench").Dataset(table)
    return Split(Path(rows.where).stem, data, False, own="your own data", unit=rows.unit)


def folded(text: str) -> str:
    """`text` as it looks: NFKC, no characters of zero width, white space collapsed, 1 for 1.0."""
    shown = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf")
    return re.sub(r"^([-+]?\d+)\.0*$", r"\1", " ".join(shown.split()))


def _filled(value: str | list[str | None] | None) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_filled, value))
    return bool(value and value.strip())


def _wrong_type(rows: Rows, column: str, kind: Any, error: Exception) -> str:
    """The message for a column that cannot be cast, with the first such row if there is one."""
    pa = need("pyarrow", "bench")
    place, reason = "", error
    for row in range(rows.table.num_rows):
        try:
            rows.table[column].slice(row, 1).cast(kind)
        except pa.ArrowException as row_error:
            place, reason = f" in {rows.at(row)}", row_error
            break
    return f"{rows.where}: column {column!r} does not hold {kind}{place} ({one_line(reason)}): {rows.remedy}"


def _from_folder(folder: Path, splits: Sequence[str], remedy: str, texts: Collection[str] | None = None) -> Rows:
    """The rows of the first of `splits` for which the folder has a file."""
    for split in splits:
        files = [file for ending in ENDINGS if (file := folder / f"{split}{ending}").is_file()]
        if len(files) > 1:
            raise InputError(f"{folder} has both {files[0].name} and {files[1].name}: keep only one of them")
        if files:
            return _from_file(files[0], split, texts)
    endings = f" (nor {' or '.join(ENDINGS[1:])})"
    raise InputError(f"{folder / splits[0]}.parquet does not exist{endings}: {remedy}")


def _from_file(file: Path, split: str, texts: Collection[str] | None = None) -> Rows:
    if file.suffix == ".parquet":
        return Rows(_parquet(file), split, str(file))
    unit = "row" if file.suffix == ".json" else "line"
    with _open(file) as content:
        text = lines(content, str(file))
        if file.suffix == ".csv":
            numbered = ((each.number, each.row) for each in Csv(text, str(file)))
        else:
            found = (
                _json(file) if file.suffix == ".json" else ((each.number, each.row) for each in jsonl(text, str(file)))
            )
            numbered = ((number, row if texts is None else _as_json(row, texts)) for number, row in found)
        table, numbers, mixed = _table(file, numbered, unit)
    return Rows(table, split, str(file), unit=unit, numbers=numbers, mixed=mixed)


def _parquet(file: Path) -> "pa.Table":
    pa = need("pyarrow", "bench")
    try:
        # not as a dataset, whose reader takes folder names for columns
        return need("pyarrow.parquet", "bench").ParquetFile(check_regular(file)).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file} cannot be read as parquet ({one_line(error)}): fetch or write the file again"
        ) from error


def _table(
    file: Path, numbered: Iterator[tuple[int, dict[str, Any]]], unit: str
) -> tuple["pa.Table", list[int], dict[str, str]]:
    """The rows of a text file as a table, the number of each, or of the line on which it starts, and `Rows.mixed`."""
    pa = need("pyarrow", "bench")
    lines, rows = [], []
    for line, row in numbered:
        lines.append(line)
        rows.append(row)
    columns, mixed = {}, dict[str, str]()
    for column in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(column) for row in rows]
        try:
            columns[column] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            kind = next(type(value) for value in values if value is not None)
            # only JSON has types: 1 and 1.5 go together, 1 and "1" do not
            other = [
                line
                for line, value in zip(lines, values, strict=True)
                if value is not None and type(value) is not kind and {type(value), kind} != {int, float}
            ]
            place = f" in {unit} {other[0]}" if other else ""
            mixed[column] = (
                f"{file}: column {column!r} has values of several types{place} ({one_line(error)}): give all the "
                "same type"
            )
            columns[column] = pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.table(columns), lines, mixed


def _open(file: Path) -> IO[bytes]:
    try:
        return opened(file)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None


def _json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with _open(file) as content:
            text = "".join(lines(content, str(file)))
        rows = json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is not JSON ({one_line(error)}): write a list of objects, with columns as keys"
        ) from error
    if not isinstance(rows, list):
        raise InputError(
            f"{file} is not a list of objects: write one, with columns as keys, or one object per line (.jsonl)"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{file}: row {number} is not a JSON object: write one, with columns as keys")
        yield number, row


def _as_json(row: dict[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """A row with its lists and objects as JSON, except in the columns `texts`."""
    return {
        key: json.dumps(each) if isinstance(each, list | dict) and key not in texts else each
        for key, each in row.items()
    }


def _from_hub(dataset: str, split: str, remedy: str, name: str | None = None, **options: Any) -> Rows:
    datasets = need("datasets", "bench")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    file = options.get("data_files")
    where = file if file and "://" in file else f"{dataset} ({f'{name}, ' if name else ''}{split})"
    try:
        part = "train" if file else split  # the hub's name for files without splits
        data = datasets.load_dataset(dataset, name, split=part, **options)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise InputError(f"{where} cannot be fetched from the hub ({one_line(error)}): {remedy}") from error
    return Rows(data.data.table, split, where)
