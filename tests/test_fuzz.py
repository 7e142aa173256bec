"""Whatever is given as settings, in a file, in Python or as key=value: it is taken, or refused in one line."""

import dataclasses
import io
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise import methods, tasks
from rankwise.cli import main
from rankwise.errors import InputError
from rankwise.settings import SECTIONS, RunConfig, Schema, Span, Tune, as_yaml, load, load_options
from rankwise.sweep import runners

SCHEMA = Schema(methods.registry(), tasks.registry())
"""Everything that can be named: the fuzz goes through the checks of every method and task."""
OPTIONS = sorted({field.name for kind in SCHEMA.methods.values() for field in dataclasses.fields(kind) if field.init})
KEYS = [
    *(*RunConfig.model_fields, *SECTIONS, *Tune.model_fields, *Span.model_fields, "name", "type", "columns"),
    *("method.name", "task.name", "task.type", "vary.seed", "vary.method", "vary.method.rank", "tune.trials"),
    *(f"method.{option}" for option in OPTIONS),
]

numbers = st.one_of(
    st.integers(-2, 9),
    st.integers(),
    st.integers(-(10**4_000), 10**4_000),
    st.floats(),
    st.just(1e308),
    st.just(5e-324),
)
texts = st.one_of(
    st.sampled_from([*SCHEMA.methods, *SCHEMA.tasks, *OPTIONS, "smoke", "random-bert", "all-linear", "", ".", "a\0b"]),
    st.text(st.characters(exclude_categories=()), max_size=12),  # halves of surrogate pairs too
    st.sampled_from(["x" * 5_000, "\ud800", "\x1b[31m", "a\nb", "1e999", "=", "‮"]),
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, texts, st.dates(), st.datetimes(), st.binary(max_size=3), st.builds(set)
)
keys = st.one_of(st.sampled_from(KEYS), texts)
odd_keys = st.one_of(st.none(), st.booleans(), st.integers(), st.dates())
structures = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(keys, odd_keys), inner, max_size=4)),
    max_leaves=12,
)
named = st.fixed_dictionaries(
    {"name": st.sampled_from([*SCHEMA.methods, *SCHEMA.tasks])},
    optional=dict.fromkeys(("rank", "alpha", "targets", "learning_rate", "dataset", "columns"), structures),
)
values = st.one_of(structures, named)
axes = st.dictionaries(keys, st.one_of(st.lists(values, max_size=3), values), max_size=3)
sections = {"vary": axes, "chain": st.lists(axes, max_size=3), "tune": st.dictionaries(keys, values, max_size=3)}
mappings = st.builds(
    lambda settings, parts, task: {**settings, **parts, **({"task": "cola"} if task else {})},
    st.dictionaries(keys, values, max_size=4),
    st.fixed_dictionaries({}, optional={name: st.one_of(part, values) for name, part in sections.items()}),
    st.booleans(),
)
# text that is nearly YAML: its marks, tags, anchors and numbers in any order
yamls = st.one_of(
    st.lists(
        st.sampled_from(
            [
                *(
                    "[",
                    "]",
                    "{",
                    "}",
                    ": ",
                    ", ",
                    "- ",
                    "? ",
                    "\n",
                    "\n  ",
                    "#",
                    "|\n",
                    ">\n",
                    "'",
                    '"',
                    "%",
                    "@",
                    "`",
                    "~",
                ),
                *(
                    "&a ",
                    "*a",
                    "<<: *a",
                    "!!int ",
                    "!!float ",
                    "!!set ",
                    "!!binary ",
                    "!!timestamp ",
                    "!!bool ",
                    "!!str ",
                ),
                *(
                    "!!omap ",
                    "!!pairs ",
                    "!!python/name:os.system ",
                    "!<",
                    "0x",
                    "0o7",
                    "1:30",
                    "2020-02-30",
                    ".nan",
                    "1e9",
                ),
                *(
                    "a",
                    "seed",
                    "lora",
                    "---\n",
                    "...\n",
                    r'"\ud800"',
                    r'"\0"',
                    "[" * 60,
                    "9" * 500,
                    "\t",
                    "\r",
                    "é",
                    "\ud800",
                ),
            ]
        ),
        max_size=8,
    ).map("".join),
    st.text(max_size=20),
)
overrides = st.one_of(
    st.builds("{}={}".format, keys, yamls),
    st.builds("{}={}".format, st.sampled_from(KEYS), values.map(repr)),
    st.text(max_size=8),
)
INPUTS = int(os.environ.get("RANKWISE_FUZZ", 500))
"""How many inputs the tests of this file try in all."""
some = settings(max_examples=INPUTS * 6 // 25, deadline=None, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.fuzz


def taken_or_refused(call: Any) -> Any:
    """What `call` gives; None where it raises an InputError of one line, and not a long one."""
    try:
        return call()
    except InputError as error:
        message = str(error)
    assert message.isprintable() and len(message) < 2_000, message
    return None


def check(source: Any, given_settings: list[str]) -> None:
    found = taken_or_refused(lambda: load(source, given_settings, SCHEMA))
    if isinstance(found, RunConfig):  # and then what is written in its folder says the same
        again = load(yaml.safe_load(as_yaml(found.model_dump(mode="json"))), [], SCHEMA)
        assert again == found


@some
@given(mappings, st.lists(overrides, max_size=2))
def test_a_mapping(settings: dict[Any, Any], changes: list[str]) -> None:
    check(settings, changes)


@some
@given(
    st.lists(overrides, min_size=1, max_size=3),
    st.sampled_from([{"task": "cola"}, {"task": "cola", "vary": {"seed": [0]}}]),
)
def test_settings_of_the_command_line(changes: list[str], settings: dict[str, Any]) -> None:
    check(settings, changes)


@some
@given(
    st.one_of(
        yamls.map(lambda text: text.encode(errors="replace")),
        yamls.map(lambda text: b"task: cola\nmethod: " + text.encode(errors="replace")),
        st.binary(max_size=40),
        mappings.map(lambda m: yaml.dump(m, allow_unicode=False).encode(errors="replace")),
    )
)
def test_a_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(content)
    check(file, [])


@some
@given(
    st.sampled_from(sorted(runners.registry())),
    st.lists(st.one_of(overrides, st.builds("jobs={}".format, yamls)), max_size=2),
)
def test_options_of_a_runner(name: str, changes: list[str]) -> None:
    taken_or_refused(lambda: load_options("runner", name, changes, runners.registry()))


@settings(some, max_examples=INPUTS // 25)
@given(st.lists(overrides, min_size=1, max_size=2), st.sampled_from(["validate", "train", "compare"]))
def test_the_command_line(tmp_path_factory: pytest.TempPathFactory, changes: list[str], command: str) -> None:
    """Exit code 0 or 2, and with 2 one line."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "one.yaml").write_text("task: cola\nmodel: random-bert\n")
    (folder / "sweep.yaml").write_text("task: cola\nmodel: random-bert\nvary: {seed: [0]}\n")
    file = folder / ("sweep.yaml" if command == "compare" else "one.yaml")
    arguments = ["rankwise", command, str(file), *([] if command == "validate" else ["--dry-run"]), "--", *changes]
    before, out, err = (sys.argv, signal.getsignal(signal.SIGTERM)), io.StringIO(), io.StringIO()
    sys.argv = arguments
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])
    assert left.value.code in (0, None, 2), err.getvalue()
    if left.value.code == 2:
        assert out.getvalue() == "" and err.getvalue().startswith("rankwise: ") and err.getvalue().count("\n") == 1
