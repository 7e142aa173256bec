"""An adapter on disk, without its base model: read and written one layer at a time."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from rankwise.adapters import card as cards
from rankwise.adapters import peft_folder, single_file
from rankwise.adapters.layers import Factors, Layer, StoredAdapter
from rankwise.adapters.peft_folder import CONFIG, INDEX, WEIGHTS
from rankwise.adapters.tensors import Held, file_size, write_tensors
from rankwise.errors import InputError
from rankwise.files import ADAPTER, replace_folder, unfinished

__all__ = ["Factors", "StoredAdapter", "stored", "write"]

CARD = ADAPTER[3]
COPIED = re.compile(r".+\.(?:json|jsonl|md|txt|jinja|model)")
"""Names of the files next to an adapter's weights that go with it, such as a tokenizer's."""
OWN = {CONFIG, INDEX, WEIGHTS, "trainer_state.json"}
"""Those that do not: they are written anew, or tell of the training."""


def stored(path: str | PathLike[str]) -> StoredAdapter:
    """Open an adapter on disk: the folder of a PEFT adapter, or of a run; or a file of kohya's, diffusers or ComfyUI.

    Only headers are read; `StoredAdapter.factors` reads a layer.

    Raises:
        InputError: there is none, it is a pickle or the state of a training, it is no LoRA, its tensors do not fit each
            other or its configuration, or it has tensors that are not known here.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: is not there; an adapter on a hub has to be downloaded first")
    if path.is_dir() and not (path / CONFIG).exists():
        files = sorted(path.glob("*.safetensors"))
        if (path / "adapter" / CONFIG).exists():
            path = path / "adapter"  # of a run
        elif len(files) == 1:
            path = files[0]
        else:
            raise InputError(f"{path}: holds no adapter: neither {CONFIG} nor one safetensors file")
    if path.name == WEIGHTS and (path.parent / CONFIG).exists():
        path = path.parent
    if path.is_dir():
        return peft_folder.read(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: is no safetensors file; only those are read, as others can run any code")
    return single_file.read(path)


def write(
    out: str | PathLike[str],
    like: StoredAdapter,
    factors: Mapping[str, Factors] | Iterable[tuple[str, Factors]],
    *,
    force: bool = False,
    padded: int = 0,
    targets: Sequence[str] | str | None = None,
    left_out: int | None = None,
    card: bool = False,
) -> Path:
    """Write an adapter as `like` with other factors, completely or not at all, one layer at a time.

    A layer of `like` that `factors` does not have, or has at rank 0, is left out, except one whose rank cannot change.
    Numbers have the type that they have in `like`, and all that belongs to no layer is copied.

    The scales s go into B, so that one alpha is enough and each layer is scaled by alpha / its rank: B ← B · s · r /
    alpha. It is the commonest s · r of `like`; in a single file without alphas it is r. PEFT's configuration then has
    no `alpha_pattern` and no rslora. (Each layer of a file of kohya's could have an alpha of its own, but diffusers
    0.42 takes the commonest for the projections of attention.)

    Args:
        out: a folder; a name that ends in .safetensors where `like` is a single file.
        factors: by layer, in any order; an iterator is read as it is written. The rank may be any.
        force: replace an adapter that is there already.
        padded: the rank that all layers get, by zeros; 0 for each its own.
        targets: `target_modules` in PEFT's configuration; without, those of `like` if they are ends of names and no
            layer is left out, else each layer in full.
        left_out: how many layers of the names that it has are not in the new adapter; counted where absent.
        card: copy any model card as it is; without, only one of rankwise's, which then says what has changed.

    Raises:
        InputError: something is at `out`, the factors do not fit the layer, nothing is left, or a layer would be left
            out that has a bias or a magnitude.
    """
    out = Path(out)
    check_free(out, like, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    pairs = factors.items() if isinstance(factors, Mapping) else factors
    common, ranks, unpadded = _commonest(like, padded), dict[str, int](), dict[str, int]()

    def alpha(name: str, rank: int) -> float:
        """The alpha that the file has for a layer."""
        if like.config is not None:
            return common
        layer = like.layers.get(name, next(iter(like.layers.values())))
        if "alpha" not in layer.parts:
            return rank
        return float(torch.tensor(common, dtype=like.tensors.dtype[layer.parts["alpha"]]))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from _tensors(like, pairs, padded, alpha, ranks, unpadded)
        if not ranks:
            raise InputError(f"{out}: no layer would have any rank; allow more")

    def missing() -> int | None:
        return peft_folder.left_out(like.tensors, like.layers, ranks) if left_out is None else left_out

    if like.config is None:
        with unfinished(out) as new:
            write_tensors(new, tensors(), lambda: single_file.metadata(like, ranks))
            new.replace(out)
        return out
    with unfinished(out, folder=True) as temporary:
        new = temporary / "adapter"
        new.mkdir()
        for file in sorted(like.path.iterdir()):
            own = file.name in OWN or (file.name == CARD and not (card or cards.ours(like.path)))
            if COPIED.fullmatch(file.name) and not own and file.is_file():
                shutil.copyfile(file, new / file.name)
        write_tensors(new / WEIGHTS, tensors(), lambda: peft_folder.metadata(unpadded, missing()))
        if targets is None and ranks.keys() == like.layers.keys():
            targets = peft_folder.own_targets(like.config)
        same = ranks == {name: layer.rank for name, layer in like.layers.items()}
        begun = like.config if same else peft_folder.begun_anew(like.config)
        config = peft_folder.compact(begun, ranks, common, targets)
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        if not card:
            cards.renew(new)
        replace_folder(out, new)
    return out


def size(like: StoredAdapter, ranks: Mapping[str, int]) -> int:
    """Bytes of the file of weights that `write` makes of the layers of `like` at these ranks."""
    at = {**ranks, **{name: layer.rank for name, layer in like.layers.items() if layer.fixed}}
    at = {name: rank for name, rank in at.items() if rank}
    if like.config is None:
        return file_size(_held(like, at), single_file.metadata(like, at))
    return file_size(_held(like, at), peft_folder.metadata({}, peft_folder.left_out(like.tensors, like.layers, at)))


def padding(adapter: StoredAdapter) -> int:
    """Bytes of the zeros with which `portable` pads an adapter to one rank."""
    shapes, kinds = adapter.tensors.shape, adapter.tensors.dtype
    needed = _held(adapter, {name: layer.rank for name, layer in adapter.layers.items()})
    whole = [(key, kinds[key], shape) for key, shape in shapes.items()]
    numbers, without = (sum(prod(shape) * kind.itemsize for _, kind, shape in each) for each in (whole, needed))
    return numbers - without


def _held(like: StoredAdapter, ranks: Mapping[str, int]) -> list[Held]:
    """The tensors of an adapter as `like` whose layers have these ranks."""
    held: list[Held] = []
    for name, rank in ranks.items():
        layer = like.layers[name]
        for part in sorted(layer.parts, key=lambda each: ("A", "B", each).index(each)):
            shape = [*like.tensors.shape[key := layer.parts[part]]]
            if part in ("A", "B") and not (layer.fixed and layer.kernel):
                shape["AB".index(part)] = rank
            held.append((key, like.tensors.dtype[key], () if part == "alpha" else tuple(shape)))
    return held + [(key, like.tensors.dtype[key], like.tensors.shape[key]) for key in like.others]


def check_free(out: Path, like: StoredAdapter, force: bool) -> None:
    """Raise InputError unless an adapter as `like` can be written to `out`: a new name, or an adapter with `force`."""
    if like.config is None and out.suffix != ".safetensors":
        raise InputError(f"{out}: as {like.path.name} is a single file, give a name that ends in .safetensors")
    if like.config is not None and out.suffix == ".safetensors":
        raise InputError(f"{out}: as {like.path.name} is a folder, give the name of a folder")
    if not os.path.lexists(out):
        return
    if out.is_dir() != (like.config is not None):
        raise InputError(f"{out}: is a {'folder' if out.is_dir() else 'file'}; give another name")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"{out}: is there already; give another name, or --force to replace it")
    if out.is_dir():
        folders = sorted(path.name for path in out.iterdir() if path.is_dir())
        if folders or not (out / CONFIG).is_file():
            what = folders[0] if folders else "something other than an adapter"
            raise InputError(f"{out}: holds {what}, which would be lost; give another name")


def _commonest(like: StoredAdapter, padded: int) -> float:
    """The commonest s · r, with which most of B need not change; for PEFT a whole number, as some consumers want it."""
    layers = [layer for layer in like.layers.values() if "alpha" in layer.parts] or [*like.layers.values()]
    products = [layer.scale * (padded or layer.rank) for layer in layers]
    found = Counter(float(f"{each:.6g}") if like.config is None else max(1, round(each)) for each in products)
    return found.most_common(1)[0][0]


def _tensors(
    like: StoredAdapter,
    pairs: Iterable[tuple[str, Factors]],
    padded: int,
    alpha: Callable[[str, int], float],
    ranks: dict[str, int],
    unpadded: dict[str, int],
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new adapter by name; `ranks` takes the rank of each layer, `unpadded` those that were less."""
    for name, new in pairs:
        layer = like.layers.get(name)
        if layer is not None and (layer.fixed or layer.size != (new.A.shape[1], new.B.shape[0])):
            raise InputError(f"{like.path}: {name} is {layer.size[::-1]}, but its new factors are not")
        rank = max(padded, new.rank)
        if not rank:
            if extra := layer and layer.parts.keys() - {"A", "B", "alpha"}:
                raise InputError(f"{like.path}: {name} has a {min(extra)} besides A and B, so its rank cannot be 0")
            continue
        ranks[name] = rank
        if new.rank < rank:
            unpadded[name] = new.rank
        A, B = pad(new.A, 0, rank).reshape(rank, -1, *new.kernel), pad(new.B, 1, rank)
        B = B.reshape(*B.shape, *(1 for _ in new.kernel))
        yield from _layer(like, name, {"A": A, "B": B}, new, alpha(name, rank))
    for name, layer in like.layers.items():
        if layer.fixed:
            old = {part: like.factor(name, part) for part in ("A", "B")}
            if padded > layer.rank:
                if layer.kernel:
                    raise InputError(f"{like.path}: the rank of {name} cannot change: {layer.fixed}")
                old = {"A": pad(old["A"], 0, padded), "B": pad(old["B"], 1, padded)}
                unpadded[name] = layer.rank
            ranks[name] = len(old["A"])
            yield from _layer(like, name, old, layer, alpha(name, ranks[name]))
    for key in like.others:
        yield key, like.tensor(key)


def pad(factor: Tensor, dim: int, rank: int) -> Tensor:
    """A factor with zeros up to `rank` units along the dimension that has them."""
    if factor.shape[dim] == rank:
        return factor
    shape = [rank - size if place == dim else size for place, size in enumerate(factor.shape)]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _layer(
    like: StoredAdapter, name: str, factors: dict[str, Tensor], new: Factors | Layer, alpha: float
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer that is scaled by `alpha` / r: A and B in the shape of its file, and what else it has."""
    layer = like.layers.get(name)
    first_name, first = next(iter(like.layers.items()))
    for part, value in factors.items():
        if layer is not None:
            key, kind = layer.parts[part], like.tensors.dtype[layer.parts[part]]
        elif like.config is not None:
            key, kind = peft_folder.key(name, part, new.embedding), value.dtype
        else:
            key, kind = name + first.parts[part].removeprefix(first_name), value.dtype
        yield key, _scaled(value, 1 if part == "A" else new.scale * len(factors["A"]) / alpha, kind)
    parts = layer.parts if layer is not None else {"alpha": f"{name}.alpha"} if "alpha" in first.parts else {}
    for part in [each for each in parts if each not in factors]:
        if part == "alpha":
            yield parts[part], torch.tensor(alpha, dtype=like.tensors.dtype.get(parts[part], torch.float32))
        elif part == "bias":  # of B, and scaled as B is
            assert layer is not None
            yield parts[part], like.tensor(parts[part]) * (layer.scale * len(factors["A"]) / alpha)
        else:
            yield parts[part], like.tensor(parts[part])


def _scaled(tensor: Tensor, factor: float, kind: torch.dtype) -> Tensor:
    """`factor` times a tensor, as numbers of a type. InputError where they are too large for it."""
    scaled = tensor.to(kind) if factor == 1 else (tensor.double() * factor).to(kind)
    if not scaled.double().isfinite().all() and tensor.double().isfinite().all():
        raise InputError(f"an adapter of {kind} numbers cannot hold B times {factor:g}: convert it to float32 first")
    return scaled
