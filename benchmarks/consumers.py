"""What vLLM, SGLang, TGI and LoRAX make of an adapter in each layout: their own loaders, run on the CPU.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/consumers.py --get      # wheels of 0.4 GB each; little is kept
    git clone --depth 1 https://github.com/predibase/lorax .venv-clients/consumers/lorax
    git clone --depth 1 https://github.com/huggingface/text-generation-inference .venv-clients/consumers/tgi

Only what loads an adapter is run; what else these programs import, such as their kernels, is replaced by names that do
nothing. ΔW of each layer is compared with PEFT's, on a Llama of three blocks with mixed ranks, with and without empty
layers, and with one rank on some of the layers of a block. Each loader runs in a process of its own; `rankwise.save`
and `rankwise.export_adapter` write the layouts.
"""

import argparse
import importlib.abc
import importlib.machinery
import os
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw

SOURCES = Path(__file__).parent.parent / ".venv-clients" / "consumers"
WHEELS = {"vllm": ("0.6.6", "0.10.2", "0.31.0", "0.32.0", "0.33.0"), "sglang": ("0.5.23",)}
PARTS = {"vllm": "vllm/lora/", "sglang": "sglang/srt/lora/"}
PLATFORMS = ("manylinux1_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLACES = {name: "self_attn" if name in TARGETS[:4] else "mlp" for name in TARGETS}
STACKED = {"qkv_proj": TARGETS[:3], "gate_up_proj": TARGETS[4:6]}
HIDDEN, KEYS, INNER, BLOCKS = 64, 32, 96, 3
ROWS = {"q_proj": HIDDEN, "k_proj": KEYS, "v_proj": KEYS, "gate_proj": INNER, "up_proj": INNER}
ADAPTERS = {
    "mixed": ((4, 8, 12, 3, 10), TARGETS),
    "empty": ((4, 8, 0, 12, 3), TARGETS),
    "≤ 8": ((4, 8, 3, 8, 2), TARGETS),
    "≤ 8, empty": ((4, 8, 0, 8, 2), TARGETS),
    "8 on q": ((8,), ("q_proj",)),
    "8 on v": ((8,), ("v_proj",)),
    "8 on q and v": ((8,), ("q_proj", "v_proj")),
    "8 on up": ((8,), ("up_proj",)),
}
"""Label -> the ranks of its layers, over and over, and which layers it has."""
LAYOUTS = ("patterns", "compact", "portable")
Deltas = dict[str, Tensor]


class Anything(type):
    """Classes that stand for what a loader imports and does not use."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *given: Any, **more: Any) -> Any:
        if "lora" in cls.__name__.lower():  # the loader's own, which inherits from such a class
            return super().__call__(*given, **more)
        return given[0] if len(given) == 1 and callable(given[0]) else cls  # a decorator

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __bool__(cls) -> bool:
        return False


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module that is not there, of which every attribute is a class that does nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything("Nothing", (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def vllm(folder: Path) -> Deltas:
    from vllm.lora.peft_helper import PEFTHelper

    try:
        from vllm.lora.lora_model import LoRAModel

        LoRAModel.from_local_checkpoint.__func__  # noqa: B018 - a stand-in has none
    except AttributeError:  # before 0.12
        from vllm.lora.models import LoRAModel
    takes = LoRAModel.from_local_checkpoint.__func__.__code__.co_varnames
    more: dict[str, Any] = {"lora_model_id": 1, "device": "cpu"}
    more |= {name: kind() for name, kind in {"embedding_modules": dict, "embedding_padding_modules": list}.items()}
    given: list[Any] = [str(folder), list(TARGETS)]
    if "peft_helper" in takes[:4]:
        helper = PEFTHelper.from_local_dir(str(folder), 64)
        helper.validate_legal(types.SimpleNamespace(max_lora_rank=16, bias_enabled=False))
        given.append(helper)
    model = LoRAModel.from_local_checkpoint(*given, **{name: value for name, value in more.items() if name in takes})
    found = {}
    for name, layer in model.loras.items():
        layer.optimize()
        A, B = layer.lora_a, layer.lora_b
        found[name] = (A @ B).T if A.shape[0] > A.shape[1] else B @ A  # once (in, r) and (r, out)
    return found


def sglang(folder: Path) -> Deltas:
    from sglang.srt.lora import lora, utils
    from sglang.srt.lora.lora_config import LoRAConfig

    lora.get_layer_id = lambda name: int(m[1]) if (m := re.search(r"layers\.(\d+)\.", name)) else None
    config = LoRAConfig(str(folder))
    targets = utils.get_normalized_target_modules(config.target_modules)
    base = types.SimpleNamespace(num_hidden_layers=BLOCKS, architectures=["LlamaForCausalLM"], model_type="llama")
    adapter = lora.LoRAAdapter("a", config, base, None, types.SimpleNamespace(name="triton"))
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    found = {}
    for weights in (layer.weights for layer in adapter.layers):
        for name in [name for name in weights if "lora_A" in name]:
            A, B = weights[name], weights[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            end = module.rpartition(".")[2]
            utils.get_target_module_name(name, targets)  # as load_lora_weight_to_buffer of mem_pool.py does
            parts = STACKED.get(end, (end,))
            # the pool asserts this too
            assert A.shape[0] == config.r * len(parts) and B.shape[1] == config.r, "LoRA buffer shape does not match"
            blocks = B.split([ROWS[part] for part in parts]) if end in STACKED else (B,)
            for part, b, a in zip(parts, blocks, A.split(config.r), strict=True):
                found[module.replace(end, part)] = adapter.scaling * b @ a
    return found


def _punica(folder: Path, tgi: bool) -> Deltas:
    from lorax_server.utils import punica

    punica.has_sgmv = lambda: True
    layer = types.SimpleNamespace(base_layer=types.SimpleNamespace(linear=types.SimpleNamespace(weight=torch.zeros(1))))
    modules = {
        (block, name): (f"model.layers.{block}.{PLACES[name]}.{name}", layer)
        for block in range(BLOCKS)
        for name in TARGETS
    }
    if tgi:
        from text_generation_server.adapters import lora

        lora.punica_sgmv, lora.SYSTEM = punica, "cuda"
    else:
        from lorax_server.adapters import lora

        lora.load_module_weight = lambda name, weight, device, dtype: weight.to(device, dtype)
    config = lora.LoraConfig.load(str(folder), None)
    tensors = load_file(folder / "adapter_model.safetensors")
    mapped, names = config.map_weights_for_model(tensors, tuple(name for name, _ in modules.values()))
    found, one = {}, types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    model = types.SimpleNamespace(
        get_num_layers_for_type=lambda name: BLOCKS,
        target_to_layer=modules,
        dtype=torch.float32,
        world_size=1,
        shard_lora_weights=lambda a, b, name: (a, b),
    )
    for name in TARGETS:
        if tgi:
            given = (config, mapped, name, {*names}, BLOCKS, torch.float32, 1, one, modules)
            weights = lora.LoraWeights.prepare_weights(*given)
        else:
            weights = lora.LoraWeights.load(config, model, mapped, name, {*names})
        for block in range(BLOCKS) if weights is not None else ():
            a, b = weights.weights_a[block], weights.weights_b[block]
            found[modules[block, name][0]] = ((a if a.shape[-1] == len(b) else a.T) @ b).T
    return found


def lorax(folder: Path) -> Deltas:
    return _punica(folder, tgi=False)


def tgi(folder: Path) -> Deltas:
    return _punica(folder, tgi=True)


def peft(folder: Path) -> Deltas:
    from peft import PeftModel

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder.parent.parent / "base"), str(folder))
    modules = model.get_base_model().named_modules()
    return {name: module.get_delta_weight("default") for name, module in modules if hasattr(module, "get_delta_weight")}


LOADERS: dict[str, Callable[[Path], Deltas]] = {f.__name__: f for f in (peft, vllm, sglang, lorax, tgi)}


def loaded(name: str, folder: Path, out: Path) -> Deltas | str:
    """ΔW by layer as the consumer has it, or its error; in a process of its own."""
    if not (child := os.fork()):
        try:
            sys.path[:0] = [str(path) for path in (SOURCES / name, SOURCES / name / "server", SOURCES / "lorax/server")]
            for path in (SOURCES / name, SOURCES / "lorax"):  # their packages want more than their loaders do
                for package in path.glob("server/*_server"):
                    module = types.ModuleType(package.name)
                    module.__path__ = [str(package)]
                    sys.modules[package.name] = module
            if name != "peft":
                sys.modules.setdefault("regex", re)
                sys.meta_path.append(Absent())
            with torch.no_grad():
                found = LOADERS[name.partition("-")[0]](folder)
            save_file({key: value.float().contiguous() for key, value in found.items()}, out)
            os._exit(0)
        except BaseException as error:
            out.write_text(f"{type(error).__name__}: {' '.join(str(error).split())}")
            os._exit(1)
    return out.read_text() if os.waitpid(child, 0)[1] else load_file(out)


def written(folder: Path, ranks: tuple[int, ...], targets: tuple[str, ...]) -> None:
    """An adapter on `targets` with these ranks, over and over, in each layout."""
    model = rw.LoRA(rank=8, alpha=16, targets=list(targets)).attach(
        LlamaForCausalLM.from_pretrained(folder.parent / "base")
    )
    names = [site.name for site in rw.sites(model)]
    rw.resize(model, {name: ranks[place % len(ranks)] for place, name in enumerate(names)})
    for site in rw.sites(model):
        if site.present:
            torch.nn.init.normal_(site.A, std=0.3)
            torch.nn.init.normal_(site.B, std=0.3)
    rw.save(model, folder / "compact")
    model.save_pretrained(str(folder / "patterns"))
    rw.export_adapter(folder / "compact", folder / "portable", to="sglang")  # portable, with what SGLang needs besides


def verdict(found: Deltas | str, truth: Mapping[str, Tensor]) -> str:
    if isinstance(found, str):
        return "refused: " + found[:90]
    wrong = {
        name: float((found[name].flatten() @ value.flatten()) / value.norm() ** 2) if name in found else 0.0
        for name, value in truth.items()
        if name not in found or (found[name] - value).norm() > 1e-5 * value.norm()
    }
    if not wrong:
        return "right"
    least, most = min(wrong.values()), max(wrong.values())
    return f"wrong: {len(wrong)} of {len(truth)} layers by a factor of {least:.3g} to {most:.3g}"


def get() -> None:
    """Put what loads adapters in the wheels of WHEELS into SOURCES."""
    for package, versions in WHEELS.items():
        for version in versions:
            with tempfile.TemporaryDirectory() as folder:
                pip = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "--only-binary",
                    ":all:",
                    "-d",
                    folder,
                ]
                pip += [word for platform in PLATFORMS for word in ("--platform", platform)]
                subprocess.run([*pip, f"{package}=={version}"], check=True)
                [wheel] = Path(folder).glob("*.whl")
                place = SOURCES / f"{package}-{version}"
                with zipfile.ZipFile(wheel) as file:
                    file.extractall(place, [each for each in file.namelist() if each.startswith(PARTS[package])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--get", action="store_true", help="download the wheels first")
    if parser.parse_args().get:
        get()
    names = [
        "peft",
        *(f"{name}-{version}" for name, versions in WHEELS.items() for version in versions),
        "lorax",
        "tgi",
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "vocab_size": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(root / "base")
        print("| ranks | consumer | " + " | ".join(LAYOUTS) + " |\n|---|---|" + "---|" * len(LAYOUTS))
        for number, (label, (ranks, targets)) in enumerate(ADAPTERS.items()):
            adapter = root / str(number)
            written(adapter, ranks, targets)
            truth = loaded("peft", adapter / "patterns", root / "out")
            assert not isinstance(truth, str), truth
            for name in names:
                if name != "peft" and not (SOURCES / name).exists():
                    print(f"{SOURCES / name}: is not there; see --help", file=sys.stderr)
                    continue
                cells = [verdict(loaded(name, adapter / layout, root / "out"), truth) for layout in LAYOUTS]
                print(f"| {label} | {name} | " + " | ".join(cells) + " |", flush=True)
