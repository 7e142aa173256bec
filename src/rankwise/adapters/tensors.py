"""Safetensors files: read one tensor at a time, written one at a time, so that large ones need little memory."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.errors import InputError
from rankwise.files import check_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The types of a safetensors file that torch has."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Held = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, type and shape of a tensor."""
_MAPPED = 32 * 1024**2
"""Bytes read from a file before it is mapped into memory again: pages once read count as memory of this process."""


class Tensors:
    """The tensors of one or more safetensors files by name. Only the headers are read at once.

    Raises:
        InputError: a file is missing, damaged, or holds a type of number that torch does not have, or two files hold
            the same tensor.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = list(files)
        self.file: dict[str, Path] = {}
        """Name of a tensor -> its file."""
        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for file in self.files:
            self._headers(file)

    def _headers(self, file: Path) -> None:
        opened = _opened(file)
        self.metadata |= opened.metadata() or {}
        for name in opened.keys():  # noqa: SIM118 - not a dictionary
            if name in self.file:
                raise InputError(f"{file}: holds {name}, and so does {self.file[name].name}: one of them is left over")
            part = opened.get_slice(name)
            if (kind := part.get_dtype()) not in DTYPES:
                raise InputError(f"{file}: {name} holds numbers of type {kind}, which are not read here: convert them")
            self.file[name], self.shape[name], self.dtype[name] = file, tuple(part.get_shape()), DTYPES[kind]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        file = self.file[name]
        if self._open is None or self._open[0] != file or self._read > _MAPPED:
            self._open, self._read = (file, _opened(file)), 0
        tensor: Tensor = self._open[1].get_tensor(name).clone()
        self._read += tensor.nbytes
        return tensor


def _opened(file: Path) -> Any:
    try:
        return safe_open(check_regular(file), "pt")
    except FileNotFoundError:
        raise InputError(f"{file}: is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: is damaged, or no safetensors file ({error}): get it again") from None


def write_tensors(file: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Callable[[], Mapping[str, str]]) -> None:
    """Write a safetensors file from tensors that come one at a time.

    Their shapes are known only at the end, but stand at the beginning of the file: the numbers are collected in a file
    for each type first, and `metadata` is asked for after the last. Types with wide numbers come first, as safetensors
    has them, so that all are aligned.
    """
    held: list[Held] = []
    with ExitStack() as stack:
        parts: dict[torch.dtype, Any] = {}
        for name, tensor in tensors:
            kind = tensor.dtype
            if kind not in parts:
                part = file.with_name(f"{file.name}.{NAMES[kind]}")
                stack.callback(part.unlink, missing_ok=True)
                parts[kind] = stack.enter_context(part.open("w+b"))
            parts[kind].write(_bytes(tensor))
            held.append((name, kind, tuple(tensor.shape)))
        with file.open("wb") as out:
            out.write(_header(held, metadata())[0])
            for kind in _order(parts):
                parts[kind].seek(0)
                shutil.copyfileobj(parts[kind], out, 2**20)


def file_size(held: Iterable[Held], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write_tensors` makes of tensors with these names, types and shapes."""
    header, numbers = _header([*held], metadata)
    return len(header) + numbers


def _order(kinds: Iterable[torch.dtype]) -> list[torch.dtype]:
    return sorted(kinds, key=lambda kind: (-kind.itemsize, NAMES[kind]))


def _header(held: Sequence[Held], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """What stands before the numbers, and how many bytes they have."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for kind in _order({kind for _, kind, _ in held}):
        for name, _, shape in [each for each in held if each[1] == kind]:
            size = prod(shape) * kind.itemsize
            header[name] = {"dtype": NAMES[kind], "shape": shape, "data_offsets": [place, place + size]}
            place += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, place


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
