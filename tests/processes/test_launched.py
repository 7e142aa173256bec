"""Which process of how many this is, by an environment that may be left over from something else."""

import pytest

from asserts import refused
from rankwise.processes.launched import NEEDED, is_main, launched

COMPLETE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_complete_environment_is_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, COMPLETE)
    assert (launched(), is_main()) == (2, False)
    put(monkeypatch, {"RANK": "0"})
    assert (launched(), is_main()) == (2, True)


@pytest.mark.parametrize("size", [None, "", "0", "1"])
def test_ranks_without_a_number_of_processes_are_none(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {**COMPLETE, "WORLD_SIZE": size or ""})
    if size is None:
        monkeypatch.delenv("WORLD_SIZE")
    assert (launched(), is_main()) == (1, True)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("value", [None, ""])
def test_what_is_missing_is_named_and_the_process_tells_it_at_once(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, {**COMPLETE, name: value or ""})
    if value is None:
        monkeypatch.delenv(name)
    assert f"one of several processes, but {name} is not set: unset WORLD_SIZE" in refused(launched)
    assert is_main()


def test_all_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {"WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    assert "but RANK and LOCAL_RANK and MASTER_ADDR are not set" in refused(launched)


@pytest.mark.parametrize("wrong", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "-2"}, {"RANK": "2"}, {"RANK": "first"}])
def test_what_is_no_number_of_a_process_is_refused(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {**COMPLETE, **wrong})
    message = refused(launched)
    assert message.startswith(f"WORLD_SIZE={wrong.get('WORLD_SIZE', '2')} in the environment says")
    assert f"RANK={wrong.get('RANK', '1')} is not below it" in message
