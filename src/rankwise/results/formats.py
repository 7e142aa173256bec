"""How values and tables are written for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import shown_line
from rankwise.metrics.metric import Interval


def span(interval: Interval | None) -> str:
    """An interval as `0.712 … 0.790`; "" for none."""
    return "" if interval is None else f"{interval[0]:.3f} … {interval[1]:.3f}"


def span_over(interval: Interval | None, seeds: int) -> str:
    """The interval over so many seeds, or why there is none: one says nothing, and neither do equal ones."""
    if interval is not None or seeds < 2:
        return span(interval)
    return "equal at both seeds" if seeds == 2 else f"equal at all {seeds} seeds"


def plus_minus(mean: float | None, sd: float | None) -> str:
    """`0.751 ± 0.012`, or the mean alone for one seed; "" for no mean."""
    if mean is None:
        return ""
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def word(value: Any) -> str:
    """A setting as people say it: `not set` for None, options after the name of a method or a task."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={word(each)}" for key, each in value.items() if key != "name")
        return f"{value.get('name', '')} ({options})" if options else str(value.get("name", ""))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, columns as wide as they need; the first is ranged left, numbers right."""
    header, *rows = ([shown_line(cell) for cell in line] for line in (header, *rows))
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(index) and all(_numeric(cell) for cell in column[1:]) for index, column in enumerate(columns)]
    lines = [
        "  ".join(
            cell.rjust(width) if ranged else cell.ljust(width)
            for cell, width, ranged in zip(line, widths, right, strict=True)
        )
        for line in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-+−"
