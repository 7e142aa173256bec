"""A script with its arguments, in which accelerate shards on CPUs as it does on GPUs: `on_cpus.py SCRIPT …`.

accelerate shards on GPUs only, and is told here that the CPUs are some; what follows is its own FSDP2, over gloo.
"""

import runpy
import sys
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

if __name__ == "__main__":
    state: Any = PartialState
    state._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    del sys.argv[0]
    left = runpy.run_path(sys.argv[0], run_name="__main__")
    assert isinstance(left["trainer"].model, FSDPModule)
    torch.distributed.destroy_process_group()
