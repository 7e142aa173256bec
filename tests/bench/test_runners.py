from pathlib import Path

import pytest

from rankwise.bench.runners import Ended, Runner, registry, runner
from rankwise.bench.runners.local import Local, cores, default_jobs
from rankwise.config import InputError


def test_a_runner_is_found_by_its_name() -> None:
    assert runner("local") is Local
    with pytest.raises(InputError, match=r'--runner locl: there is no such runner \(did you mean "local"\?\); known: '):
        runner("locl")


def test_a_new_runner_registers_itself() -> None:
    class Elsewhere(Runner, name="elsewhere"):
        pass

    try:
        assert registry()["elsewhere"] is Elsewhere
    finally:
        del Runner.known["elsewhere"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (3, "the process ended with exit code 3"),
        (-9, "the process was killed by signal 9, as the kernel does when memory runs out"),
        (-11, "the process was killed by signal 11"),
    ],
)
def test_why_a_process_ended(code: int, reason: str) -> None:
    assert Ended(Path("run"), code).reason == reason


def test_there_is_a_job_for_every_core_unless_a_gpu_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_jobs() == cores() >= 1
