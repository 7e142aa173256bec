"""Stands in for SLURM: sbatch, squeue, sacct, scancel or srun, as the first argument says.

Jobs are started for real, in the background. What is known of one lies in the folder $SLURM_STAND_IN/JOB: `name`,
`index`, `script`, `state`, and `steps`, the process ids that signals go to. Nothing starts while there is a file
$SLURM_STAND_IN/hold. A file `node-dies` in a job's folder ends the job with NODE_FAIL, and `down` beside `hold` makes
squeue and sacct fail.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HOME = Path(os.environ["SLURM_STAND_IN"])
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def state(job: Path) -> str:
    return (job / "state").read_text()


def set_state(job: Path, now: str) -> None:
    made = job / f".state.{os.getpid()}"
    made.write_text(now)
    made.replace(job / "state")


def jobs() -> list[Path]:
    return sorted(each.parent for each in HOME.glob("*/state"))


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", text))
    assert "no-requeue" in asked and asked["signal"].startswith("USR2@") and int(asked["time"]) > 0
    if asked.get("partition") == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    number = 100 + len(jobs())
    indices = range(int(re.findall(r"0-(\d+)", asked["array"])[0]) + 1) if "array" in asked else [None]
    for index in indices:
        job = HOME / (f"{number}" if index is None else f"{number}_{index}")
        job.mkdir()
        (job / "name").write_text(shlex.split(asked["job-name"])[0])
        (job / "index").write_text("N/A" if index is None else str(index))
        (job / "script").write_text(text)
        (job / "steps").touch()
        set_state(job, "PENDING")
        command = [sys.executable, __file__, "attend", str(job)]
        subprocess.Popen(command, stdin=-3, stdout=-3, stderr=-3, start_new_session=True)
    print(f"Submitted batch job {number}")


def attend(folder: str) -> None:
    """What slurmd and slurmctld do for one job."""
    job = Path(folder)
    while (HOME / "hold").exists() and state(job) == "PENDING":
        time.sleep(0.02)
    if state(job) != "PENDING":
        return
    number, _, index = job.name.partition("_")
    environment = {**os.environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_STAND_IN_JOB": str(job)}
    if index:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
    set_state(job, "RUNNING")
    process = subprocess.Popen(["bash", str(job / "script")], env=environment, start_new_session=True)
    while process.poll() is None and not (job / "node-dies").exists():
        time.sleep(0.02)
    if process.returncode is None:
        for pid in [process.pid, *steps(job), *descendants(steps(job))]:
            kill(pid, signal.SIGKILL)
        set_state(job, "NODE_FAIL")
    elif not state(job).startswith("CANCELLED"):
        set_state(job, "FAILED" if process.returncode else "COMPLETED")


def steps(job: Path) -> list[int]:
    return [int(each) for each in (job / "steps").read_text().split()]


def descendants(parents: list[int]) -> list[int]:
    """As SLURM does by control groups: a process does not get away by a session of its own."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    of = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid for pid, parent in of if parent in parents]
    return [*found, *descendants(found)] if found else []


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def srun(*arguments: str) -> None:
    options = iter(arguments)
    for option in options:
        if option == "--unbuffered":
            continue
        if option == "--output":
            job = Path(os.environ["SLURM_STAND_IN_JOB"])
            name = next(options).replace("%j", job.name).replace("%A_%a", job.name).replace("%t", "0")
            out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            continue
        (job / "steps").write_text(str(os.getpid()))
        os.execvp(option, [option, *options])


def squeue(*arguments: str) -> None:
    assert arguments[-1] == "%i|%K|%j" and "--array" in arguments
    for job in jobs():
        if not state(job).startswith(OVER):
            print(f"{job.name}|{(job / 'index').read_text()}|{(job / 'name').read_text()}")


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for job in jobs():
        print(f"{job.name}|{state(job)}|here")


def scancel(*arguments: str) -> None:
    options = dict(re.findall(r"--(\w+)=(\w+)", " ".join(arguments)))
    for name in (each for each in arguments if not each.startswith("--")):
        job = HOME / name
        if state(job).startswith(OVER):
            continue
        if state(job) == "PENDING":
            if "signal" not in options:
                set_state(job, "CANCELLED by 0")
            continue
        if "state" in options:
            continue
        if "signal" not in options:
            set_state(job, "CANCELLED by 0")
        # to all processes of the job, as under proctrack/cgroup
        number = getattr(signal, f"SIG{options.get('signal', 'TERM')}")
        for pid in [*steps(job), *descendants(steps(job))]:
            kill(pid, number)


if __name__ == "__main__":
    called, *arguments = sys.argv[1:]
    if called in ("squeue", "sacct") and (HOME / "down").exists():
        sys.exit(f"{called}: error: Unable to contact slurm controller")
    commands = (sbatch, squeue, sacct, scancel, srun, attend)
    {command.__name__: command for command in commands}[called](*arguments)
