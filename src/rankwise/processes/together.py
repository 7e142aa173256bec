"""What several processes that train one model do together: add up numbers, average gradients, compare what they decide.

Every function is called by all processes or by none. In a single process each of them does nothing.
"""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import patch_environment
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from rankwise.processes.launched import LostError, launched

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for another, which may be evaluating; the launcher ends it sooner if one has failed."""
TELL_AFTER = 10.0
"""Seconds until a process that waits for the others to come says so."""
BUCKET = 2**24
"""Numbers that are sent at once; the buffer for them is the extra memory that averaging takes."""


class ShortError(MemoryError):
    """Memory has run out in one of the processes, and all of them know it."""


class OutOfMemory(RuntimeError):  # noqa: N818 - as torch calls it
    """Memory runs out with one row at a time: nothing is left to halve."""


def join() -> None:
    """Meet the other processes of this run, where some were launched. gloo carries what is on the CPU, NCCL GPUs."""
    if launched() > 1 and count() == 1:
        tell = threading.Timer(TELL_AFTER, _tell_of_waiting)
        tell.daemon = True
        tell.start()
        try:
            PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        finally:
            tell.cancel()


def _tell_of_waiting() -> None:
    if os.environ["LOCAL_RANK"] == "0":  # once on each machine
        print(
            "waiting for the other processes of this run, because the environment says WORLD_SIZE="
            f"{launched()}, RANK={os.environ['RANK']}: start all of them by accelerate launch or torchrun, or end this "
            "one by kill -9 and unset WORLD_SIZE",
            file=sys.stderr,
            flush=True,
        )


def by_itself() -> AbstractContextManager[Any]:
    """Around accelerate's look at the environment, so that it sees no other processes where none were launched.

    It takes any LOCAL_RANK, and the ranks that MPI's and SLURM's launchers set, for those of processes to meet.
    """
    return patch_environment(LOCAL_RANK=-1, PMI_SIZE=1) if launched() == 1 else nullcontext()


def leave() -> None:
    """Part from the others, at the end of a run that went well."""
    if count() > 1:
        dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def with_others() -> Iterator[None]:
    """Around what needs all processes: torch's errors about one that is gone become LostError."""
    try:
        yield
    except RuntimeError as error:
        raise LostError("another process of this run has ended") from error


def lost(error: RuntimeError) -> bool:
    """Whether torch's error says that another process is gone, in an exchange that is not ours."""
    # gloo's have no class of their own, and name its files
    return count() > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        with with_others():
            dist.barrier()


def on_first(do: Callable[[], T]) -> T:
    """What `do` gives in the first process, in all of them.

    Raises:
        ShortError: in all, if it runs out of memory.
        LostError: in the others, if it fails in another way.
    """
    if count() == 1:
        return do()
    shared: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            shared[0] = do()
        except Exception as error:
            failure = error
            shared[1] = "memory" if out_of_memory(error) else "failed"
    with with_others():
        dist.broadcast_object_list(shared, src=0)
    if shared[1] == "memory":
        raise ShortError(str(failure or "in the main process")) from failure
    if failure is not None:
        raise failure
    if shared[1]:
        raise LostError("the main process of this run has failed")
    return shared[0]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory has run out, on a GPU or in the machine, and fewer rows may fit."""
    if isinstance(error, OutOfMemory):  # which names the error that it came of
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and (should_reduce_batch_size(error) or "_ALLOC_FAILED" in str(error))


def total(device: torch.device, *numbers: float) -> list[float]:
    """The sums of `numbers` over all processes."""
    if count() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    with with_others():
        dist.all_reduce(sums)
        return sums.tolist()


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient of `model` by its mean over the processes; one that a process lacks counts as 0.

    Call it after the last backward of a step, before gradients are clipped and the optimizer steps. It takes the place
    of DistributedDataParallel, which goes on averaging the parameters that a rank change has replaced.

    Raises:
        LostError: another process has ended.
    """
    if count() == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    having = total(trained[0].device, *(float(p.grad is not None) for p in trained))
    for bucket in _buckets(p for p, number in zip(trained, having, strict=True) if number):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        with with_others():
            dist.all_reduce(flat)
        flat /= count()
        for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = mean.view_as(p)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one kind that follow one another, as many as fit into BUCKET, or a larger one alone."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        alike = bucket and (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + p.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def agree(what: str, device: torch.device) -> bool:
    """Whether `what` is the same in all processes."""
    if count() == 1:
        return True
    digest = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7])
    own = torch.tensor([digest, -digest], device=device)
    with with_others():
        dist.all_reduce(own, dist.ReduceOp.MAX)
        most, least = own.tolist()
    return most == -least


@torch.no_grad()
def spread(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values of the first one."""
    if count() == 1:
        return
    for tensor in tensors:
        with with_others():
            dist.broadcast(tensor, src=0)
