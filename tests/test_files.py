"""Files written whole, and read whatever may lie in their place."""

from collections.abc import Callable
from pathlib import Path

import pytest

from odd_files import ODD
from rankwise.errors import InputError
from rankwise.files import (
    appended,
    check_regular,
    opened,
    read_bytes,
    read_json,
    read_lines,
    read_text,
)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("read", [opened, read_bytes, read_text, read_json, read_lines, check_regular, appended])
def test_what_is_no_file_is_one_line_and_waits_for_nothing(
    read: Callable[[Path], object], odd: Callable[[Path], None], tmp_path: Path
) -> None:
    odd(tmp_path / "x")
    with pytest.raises(
        InputError, match="x: (is a .* where a file should be|cannot be .*); move it away|cannot be read"
    ):
        read(tmp_path / "x")
