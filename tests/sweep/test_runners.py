import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asserts import refused
from rankwise.errors import InputError
from rankwise.sweep.runners import Ended, Runner, registry, runner
from rankwise.sweep.runners.local import Local, cores, default_jobs


def test_a_runner_is_found_by_its_name() -> None:
    assert isinstance(runner("local"), Local)
    with pytest.raises(InputError, match=r'--runner locl: there is no such runner \(did you mean "local"\?\); known: '):
        runner("locl")


def test_a_new_runner_registers_itself() -> None:
    class Elsewhere(Runner, name="elsewhere"):
        pass

    try:
        assert registry()["elsewhere"] is Elsewhere
    finally:
        del Runner.known["elsewhere"]


def test_options_are_checked_and_typed() -> None:
    made = runner("local", ["jobs=3", "command=[python, -m, rankwise, train]"])
    assert (made.jobs, made.command) == (3, ("python", "-m", "rankwise", "train"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", ["jobs=0"], "runner local: jobs must be at least 1, not 0"),
        ("local", ["jobs=two"], "runner.jobs = 'two': expected integer"),
        ("local", ["job=2"], 'runner.job: local has no such option (did you mean "jobs"?)'),
        ("local", ["jobs"], "'jobs': expected key=value, as in learning_rate=1e-3"),
        ("local", ["command=python"], "runner.command = 'python': expected list"),
        ("ray", ["adress=auto"], 'runner.adress: ray has no such option (did you mean "address"?)'),
        ("ray", ["cpus=0"], "runner ray: cpus must be above 0, not 0"),
        ("ray", ["cpus=nan"], "runner.cpus = 'nan': expected number"),
        ("ray", ["gpus=-1"], "runner ray: gpus must not be negative, not -1"),
        ("ray", ["memory=0"], "runner ray: memory must be above 0 GiB, not 0"),
        ("slurm", ["partion=gpu"], 'runner.partion: slurm has no such option (did you mean "partition"?)'),
        ("slurm", ["time=0"], "runner slurm: time must be at least 1, not 0"),
        ("slurm", ["time=5", "notice=600"], "runner slurm: notice must be less than the 5 min of a job, not 600 s"),
        ("slurm", ["gpus=half"], "runner.gpus = 'half': expected integer"),
        ("slurm", ["executor=pbs"], "runner.executor = 'pbs': expected 'slurm' or 'debug'"),
    ],
)
def test_a_wrong_option_is_one_line(name: str, options: list[str], message: str) -> None:
    assert refused(lambda: runner(name, options)).startswith(message)


def test_a_sweep_that_was_launched_several_times_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their runs would take one another for the other processes of one run."""
    complete = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", **complete}.items():
        monkeypatch.setenv(name, value)
    assert refused(lambda: runner("local")).startswith("a sweep is one process")


def test_a_program_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    made = runner("local", ["command=[no-such-program]"])
    message = refused(lambda: made.start(tmp_path))
    assert message == "no-such-program: cannot be started: no such file or directory"


def test_every_runner_and_each_of_its_options_is_in_the_help() -> None:
    for command in ("compare", "retry"):
        done = subprocess.run([sys.executable, "-m", "rankwise", command, "--help"], capture_output=True, text=True)
        for name, kind in registry().items():
            _, found, about = done.stdout.partition(f"\n--runner {name}: ")
            assert found
            own = [
                field.name for field in dataclasses.fields(kind) if field.init and field.name in kind.__annotations__
            ]
            described = re.findall(r"^    (\w+)(?:=.*?)?: ", about.partition("\n\n")[0], re.MULTILINE)
            assert set(own) - {"jobs"} == set(described) - {"jobs"}


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


def test_what_is_kept_is_released_once_after_the_last_block() -> None:
    closed = []

    class Counting(Local):
        def close(self) -> None:
            closed.append(self._kept)

    made = Counting(1)
    with pytest.raises(ZeroDivisionError), made.kept():
        with made.kept():
            pass
        assert not closed
        raise ZeroDivisionError
    assert closed == [0]
    with made.kept():
        pass
    assert closed == [0, 0]
