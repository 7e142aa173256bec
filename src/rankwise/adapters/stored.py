"""An adapter on disk, without its base model: read and written one layer at a time."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from rankwise.adapters import peft_folder
from rankwise.adapters.layers import Factors, StoredAdapter
from rankwise.adapters.peft_folder import CONFIG, INDEX, WEIGHTS
from rankwise.adapters.tensors import write_tensors
from rankwise.errors import InputError
from rankwise.files import replace_folder, unfinished

__all__ = ["Factors", "StoredAdapter", "stored", "write"]

COPIED = re.compile(r".+\.(?:json|jsonl|md|txt|jinja|model)")
"""Names of the files next to an adapter's weights that go with it, such as a tokenizer's and the model card."""
OWN = {CONFIG, INDEX, WEIGHTS, "trainer_state.json"}
"""Those that do not: they are written anew, or tell of the training."""


def stored(path: str | PathLike[str]) -> StoredAdapter:
    """Open an adapter on disk: the folder of a PEFT adapter, or of a run that has one.

    Only headers are read; `StoredAdapter.factors` reads a layer.

    Raises:
        InputError: there is none, it is a pickle or the state of a training, it is no LoRA, its tensors do not fit each
            other or its configuration, or it has tensors that are not known here.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: is no folder of an adapter; one from a hub has to be downloaded first")
    if not (path / CONFIG).exists() and (path / "adapter" / CONFIG).exists():
        path = path / "adapter"  # of a run
    if not (path / CONFIG).exists():
        raise InputError(f"{path}: holds no adapter: it has no {CONFIG}")
    return peft_folder.read(path)


def write(
    out: str | PathLike[str],
    like: StoredAdapter,
    factors: Mapping[str, Factors] | Iterable[tuple[str, Factors]],
    *,
    force: bool = False,
) -> Path:
    """Write an adapter as `like` with other factors, completely or not at all, one layer at a time.

    A layer of `like` that `factors` does not have, or has at rank 0, is left out, except one whose rank cannot change.
    Numbers have the type that they have in `like`, and all that belongs to no layer is copied. The scales s go into B,
    so that with one alpha each layer is scaled by alpha / its rank: B ← B · s · r / alpha, with alpha the commonest
    s · r of `like`, without `alpha_pattern` and rslora. Layers are named in full.

    Args:
        factors: by layer, in any order; an iterator is read as it is written. The rank may be any.
        force: replace an adapter that is there already.

    Raises:
        InputError: something is at `out`, the factors do not fit the layer, nothing is left, or a layer would be left
            out that has a bias or a magnitude.
    """
    out = Path(out)
    _check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(out, folder=True) as temporary:
        new = temporary / "adapter"
        new.mkdir()
        for file in sorted(like.path.iterdir()):
            if COPIED.fullmatch(file.name) and file.name not in OWN and file.is_file():
                shutil.copyfile(file, new / file.name)
        alpha, ranks = _alpha(like), dict[str, int]()
        write_tensors(new / WEIGHTS, _tensors(like, factors, alpha, ranks), {"format": "pt"})
        if not ranks:
            raise InputError(f"{out}: no layer would have any rank; allow more")
        config = peft_folder.compact(like.config or {}, ranks, alpha)
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        replace_folder(out, new)
    return out


def _check_free(out: Path, force: bool) -> None:
    """Raise InputError unless `out` can be written: it is new or empty, or, with `force`, an adapter."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; give another name")
    if any(out.iterdir()):
        if not force:
            raise InputError(f"{out}: is there already; give another name, or --force to replace it")
        if not (out / CONFIG).is_file():
            raise InputError(f"{out}: holds something else than an adapter, which would be lost; give another name")


def _alpha(like: StoredAdapter) -> int:
    """The commonest s · r, with which most of B need not change; a whole number, as some consumers expect it."""
    products = Counter(max(1, round(layer.scale * layer.rank)) for layer in like.layers.values())
    return products.most_common(1)[0][0]


def _tensors(
    like: StoredAdapter,
    factors: Mapping[str, Factors] | Iterable[tuple[str, Factors]],
    alpha: float,
    ranks: dict[str, int],
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new adapter by name; `ranks` takes the rank of each layer."""
    for name, new in factors.items() if isinstance(factors, Mapping) else factors:
        layer = like.layers.get(name)
        if layer is not None and (layer.fixed or layer.size != (new.A.shape[1], new.B.shape[0])):
            raise InputError(f"{like.path}: {name} is {layer.size[::-1]}, but its new factors are not")
        extra = layer and layer.parts.keys() - {"A", "B"}
        if not new.rank:
            if layer and extra:
                raise InputError(f"{like.path}: {name} has a {min(extra)} besides A and B, so its rank cannot be 0")
            continue
        ranks[name] = new.rank
        A, B = new.A, new.B * (new.scale * new.rank / alpha)
        if new.kernel:
            A, B = A.reshape(new.rank, -1, *new.kernel), B.reshape(*B.shape, *(1 for _ in new.kernel))
        for part, value in (("A", A), ("B", B)):
            kind = value.dtype if layer is None else like.tensors.dtype[layer.parts[part]]
            yield peft_folder.key(name, part, new.embedding), value.to(kind)
        if layer is not None:
            yield from _extra(like, name, layer.scale * new.rank / alpha)
    for name, layer in like.layers.items():
        if layer.fixed:
            ranks[name], factor = layer.rank, layer.scale * layer.rank / alpha
            yield layer.parts["A"], like.tensor(layer.parts["A"])
            yield layer.parts["B"], like.tensor(layer.parts["B"]) * factor
            yield from _extra(like, name, factor)
    for key in like.others:
        yield key, like.tensor(key)


def _extra(like: StoredAdapter, name: str, factor: float) -> Iterator[tuple[str, Tensor]]:
    """What a layer has besides A and B: the bias of B, which is scaled as B is, and DoRA's magnitude, which is not."""
    parts = like.layers[name].parts
    if "bias" in parts:
        yield parts["bias"], like.tensor(parts["bias"]) * factor
    if "magnitude" in parts:
        yield parts["magnitude"], like.tensor(parts["magnitude"])
