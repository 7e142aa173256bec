from pathlib import Path

import pytest

from rankwise.errors import InputError
from rankwise.settings import RunConfig, as_yaml, load, parse_yaml
from rankwise.settings.yaml_files import LONGEST, in_line
from small_schema import SCHEMA, one


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("3E-05", 3e-5), ("0.01", 0.01), ("1", 1.0), ("5.e-1", 0.5)]
)
def test_a_learning_rate_is_a_number_however_it_is_written(text: str, value: float, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a word."""
    file = tmp_path / "run.yaml"
    file.write_text(f"task: cola\nlearning_rate: {text}\n")
    config = load(file, [], SCHEMA)
    assert isinstance(config, RunConfig)
    assert config.learning_rate == one(f"learning_rate={text}").learning_rate == value


@pytest.mark.parametrize("word", ["1285e1020756", "012345670123", "1e5", "null", "0x1f", "plain", "a\x85b", "\u2028"])
def test_a_word_is_read_as_it_was_written(word: str) -> None:
    """Twelve hex digits may look like a number, and then a run would not know its own id; YAML has more line ends."""
    assert parse_yaml(as_yaml({"id": word, "rate": 1e-05})) == {"id": word, "rate": 1e-05}
    assert parse_yaml(in_line([word])) == [word] and len(in_line([word]).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!int x", "line 1: not valid YAML: 'x' cannot be read as int"),
        ("!!bool maybe", "line 1: not valid YAML: 'maybe' cannot be read as bool"),
        ("!!timestamp soon", "line 1: not valid YAML: 'soon' cannot be read as timestamp"),
        ("!!binary é", "line 1: not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "line 1: not valid YAML: could not determine a constructor"),
        ("2020-13-45", "line 1: not valid YAML: '2020-13-45' cannot be read as timestamp"),
        ("9" * 5_000, "line 1: not valid YAML: a number of 5,000 characters"),
        ("59:" * 1_000 + "1", "line 1: not valid YAML: a number of 3,001 characters"),
        ("[" * 500, "line 1: not valid YAML: nested deeper than 50 levels"),
        ("- " * 500, "line 1: not valid YAML: nested deeper than 50 levels"),
        ("{a: " * 500, "line 1: not valid YAML: nested deeper than 50 levels"),
        ("&a [*a]", "line 1: not valid YAML: an alias stands within what it stands for"),
        ("&a {b: [*a]}", "line 1: not valid YAML: an alias stands within what it stands for"),
        ("*a", "line 1: not valid YAML: found undefined alias"),
        (f"[{'1,' * 60_000}]", "line 1: not valid YAML: more than 50,000 values"),
        ("x" * (LONGEST + 1), "1,000,001 characters of YAML: no configuration has more than 1,000,000"),
        ("{2020-01-01: 1}", "the key datetime.date(2020, 1, 1) is no text: put it in quotes"),
        ("{on: 1}", "the key True is no text: put it in quotes"),
        ("{[1]: 1}", "line 1: not valid YAML: found unhashable key"),
        ("!!set 0x", "line 1: not valid YAML: expected a mapping node, but found scalar"),
        ("!!set {a, b}", "is a set: expected text, numbers, lists or keys"),
        ("!!binary aGFsbG8=", "b'hallo' is a bytes: expected text, numbers, lists or keys"),
        (r'"\ud800"', r"'\ud800' holds a character that no text may have"),
        (r'"a\0b"', r"'a\x00b' holds a character that no text may have"),
        (r'{"a\nb": 1}', r"'a\nb' is no key"),
        ("\udcff", "not valid YAML: unacceptable character #xdcff"),
    ],
)
def test_yaml_that_is_no_configuration_gets_one_short_line(value: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        one(f"model={value}")
    assert str(caught.value).startswith("model: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "form", ["[*{0}, *{0}, *{0}]", "{{a: *{0}, b: *{0}, c: *{0}}}", "{{<<: [*{0}, *{0}], x: *{0}}}"]
)
def test_aliases_count_as_often_as_they_stand(form: str, tmp_path: Path) -> None:
    """A file of a few hundred bytes may mean billions of values."""
    lines = ["x0: &x0 {y: z}", *(f"x{n + 1}: &x{n + 1} {form.format(f'x{n}')}" for n in range(20))]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines) + "\ntask: cola\nmethod: {name: lora, targets: *x20}\n")
    with pytest.raises(InputError, match="not valid YAML: more than 50,000 values"):
        load(file, [], SCHEMA)


def test_aliases_in_moderation_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: cola\nvary:\n  method: [&a {name: lora, rank: 2}, {<<: *a, alpha: 3}]\n  seed: [0, 1]\n")
    assert [(c.method["rank"], c.method["alpha"]) for c in load(file, [], SCHEMA).configs][::2] == [(2, 16), (2, 3)]
