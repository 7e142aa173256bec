"""A forward pass that leaves the model and the random streams as they were."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context for a forward pass without side effects: no gradients; random streams, modes and buffers are restored."""
    devices = {p.device.type for p in model.parameters()} - {"cpu", "meta"}
    device = devices.pop() if devices else "cuda"
    streams = random.getstate(), np.random.get_state()
    modes = [(part, part.training) for part in model.modules()]
    buffers = [
        (part, name, b, b._version, b.clone())
        for part in model.modules()
        for name, b in part._buffers.items()
        if b is not None
    ]
    # fork_rng needs numbered devices; Apple has none
    numbers = range(0 if device == "mps" else torch.get_device_module(device).device_count())
    mps_state = torch.mps.get_rng_state() if device == "mps" else None
    try:
        with torch.no_grad(), torch.random.fork_rng(numbers, device_type=device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training gives the same warnings
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        for part, mode in modes:
            part.training = mode
        for part, name, buffer, version, copy in buffers:
            part._buffers[name] = buffer if buffer._version == version else buffer.copy_(copy)
