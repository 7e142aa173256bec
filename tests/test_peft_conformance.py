"""A part of PEFT's own tests with rankwise in their models; `make conformance` runs all that are about LoRA."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import peft_conformance
import peft_ways

PART = "hotswap or merge_layers_multi or (Vanilla and (merge_layers or roundtrip or delete))"


def row(**other: object) -> dict:
    return {
        "test": "tests/test_x.py::test_y",
        "way": "stock",
        "outcome": "passed",
        "reason": "",
        "where": "",
        "touched": 1,
        "refused": [],
        **other,
    }


@pytest.mark.parametrize(
    ("expected", "of"),
    [
        ("passed", {}),
        ("skipped", {"outcome": "skipped"}),
        ("set aside", {"outcome": "failed", "reason": "OSError: We couldn't connect to 'https://…'"}),
        ("failed", {"way": "after a search", "outcome": "skipped"}),
        ("passed", {"way": "in a search"}),
        ("untouched", {"way": "in a search", "touched": 0}),
        ("refused", {"way": "in a search", "refused": ["adapts a layer of class Embedding"]}),
        (
            "by design",
            {"way": "in a search", "outcome": "failed", "reason": "KeyError: '…parametrizations.weight.original'"},
        ),
        ("failed", {"way": "after a search", "outcome": "failed", "reason": "KeyError: '…weight.original'"}),
        ("failed", {"way": "in a search", "outcome": "failed", "reason": "AssertionError: no", "refused": ["adapts"]}),
        ("failed", {"way": "after a search", "outcome": "failed", "reason": "OSError: We couldn't connect to"}),
        ("failed", {"way": "in a search", "outcome": "failed", "reason": "InputError: holds a tensor"}),
        ("refused", {"way": "in a search", "outcome": "failed", "reason": "InputError: no", "refused": ["adapts"]}),
    ],
)
def test_a_failure_is_never_counted_as_anything_else(expected: str, of: dict) -> None:
    assert peft_conformance.fate(row(**of))[0] == expected


@pytest.mark.large
@pytest.mark.timeout(1800)  # each way reads PEFT's 19,000 cases first
def test_what_stock_peft_passes_passes_with_rankwise_or_is_refused_by_name(tmp_path: Path) -> None:
    script = str(peft_conformance.__file__)
    done = subprocess.run(
        [sys.executable, script, "--folder", tmp_path, "--json", "-k", PART], capture_output=True, text=True
    )
    if done.returncode == 2:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    fates = Counter((each["way"], peft_conformance.fate(each)[0]) for each in rows)
    for way in peft_ways.WAYS:
        assert fates[way, "passed"] > 50 and not fates[way, "failed"], fates
