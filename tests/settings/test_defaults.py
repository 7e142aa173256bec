"""All defaults, as they were when the format of ids last rose: ids leave out what has its default.

`python tests/settings/test_defaults.py` writes `defaults.json` anew, for what was added or taken away.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rankwise import methods, tasks
from rankwise.named import defaults
from rankwise.settings import FORMAT, RunConfig

PINNED = Path(__file__).with_name("defaults.json")


def now() -> dict[str, dict[str, Any]]:
    """The defaults of all settings, methods and tasks of ours."""
    run = RunConfig(task={"name": ""}).model_dump(mode="json", exclude={"task", "runs"})
    kinds = {**methods.registry(), **tasks.registry()}
    ours = {name: kind for name, kind in kinds.items() if kind.__module__.startswith("rankwise.")}
    return {"run": run, **{f"{kind.kind} {name}": defaults(kind) for name, kind in ours.items() if defaults(kind)}}


def changed(pinned: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """The defaults that have another value than is pinned."""
    return [
        f"{part}: {name}"
        for part, values in pinned.items()
        for name, value in values.items()
        if name in found.get(part, {}) and found[part][name] != value
    ]


def test_a_default_that_changes_raises_the_format_of_ids() -> None:
    pinned, found = json.loads(PINNED.read_text()), now()
    assert pinned["format"] == FORMAT, "run `python tests/settings/test_defaults.py`"
    assert not changed(pinned["defaults"], found), (
        "a default has changed its value, so one id would mean two runs: raise FORMAT in settings/run.py, then "
        "run `python tests/settings/test_defaults.py`"
    )
    assert pinned["defaults"] == found, (
        "settings were added or taken away: run `python tests/settings/test_defaults.py`"
    )


if __name__ == "__main__":
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {"format": FORMAT, "defaults": {}}
    if pinned["format"] == FORMAT and (which := changed(pinned["defaults"], now())):
        sys.exit(f"{'; '.join(which)}: raise FORMAT in settings/run.py first")
    PINNED.write_text(json.dumps({"format": FORMAT, "defaults": now()}, indent=1) + "\n")
