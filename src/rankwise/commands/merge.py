"""An adapter merged into its base model: a plain model for transformers, and where wanted a GGUF file of it."""

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from shutil import which
from typing import Any

import torch
import transformers
from peft import PeftModel, auto
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig

from rankwise.adapters import load
from rankwise.adapters.beside import base_digest
from rankwise.adapters.save import DESCRIPTION, REPEATABLE
from rankwise.errors import InputError, nearest, require
from rankwise.files import ADAPTER, check_files, read_json, replace_folder, unfinished
from rankwise.ranks.kept import RESIDUAL
from rankwise.ranks.layers import keep_codes
from rankwise.runs import use
from rankwise.runs.use import Use
from rankwise.train.arguments import DTYPES
from rankwise.train.gguf import folder_of, is_gguf
from rankwise.train.model import head_modules, quiet
from rankwise.train.quantise import quantisation

CONFIG, WEIGHTS = ADAPTER[0], ADAPTER[2]
CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
PREFIX = "base_model.model."
MOST_ERROR = 1e-3
"""Of the largest logit: more than rounding changes, where the saved model is loaded again."""


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        folder: where it is.
        kind: its class.
        layers: how many weights were changed by the adapter.
        dtype: of the saved weights.
        rounding: ‖rounded - exact‖ / ‖what the adapter adds‖ over these weights, from saving them in `dtype`.
        untied: whether the output layer no longer shares its weights with the embedding.
        files: names of the weight files.
        gguf: the GGUF file.
    """

    folder: Path
    kind: str
    layers: int
    dtype: str
    rounding: float
    untied: bool
    files: tuple[str, ...]
    gguf: Path | None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "gguf": self.gguf and str(self.gguf)}

    def text(self) -> str:
        lines = [f"{self.folder}: {self.kind} in {self.dtype}, {self.layers} layers changed"]
        if self.rounding:
            lines.append(f"rounding to {self.dtype} changed them by {self.rounding:.2g} of what the adapter adds")
        if self.untied:
            lines.append("output layer and embedding no longer share their weights: the adapter changed one of them")
        return "\n".join([*lines, *([f"{self.gguf}: the same for llama.cpp"] if self.gguf else [])])


def merge(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    base: str | None = None,
    dtype: str | None = None,
    quantise: str | None = None,
    max_shard_size: str = "5GB",
    gguf: bool = False,
    force: bool = False,
) -> Merged:
    """Merge an adapter into its base model and write that with its tokenizer, completely or not at all.

    W + s B A is computed in fp32, one layer at a time, and rounded once. A start that was subtracted from W (PiSSA,
    OLoRA) is subtracted again first, as PEFT does. Trained heads, embeddings and statistics take the place of those of
    the base. If only one of two modules with shared weights was changed, they are separate afterwards.

    Args:
        adapter: the folder of a PEFT adapter, of what `rankwise.save` wrote, or of a run.
        base: a folder, a name on the hub or a GGUF file; else what the adapter says.
        dtype: of the saved weights, `fp32`, `bf16` or `fp16`; else that of the base.
        quantise: `4bit` or `8bit` if the adapter was trained on a base in 4 or 8 bits, which is then de-quantised for
            merging, else `none`; adapters of runs know it. A base that is saved quantised is always de-quantised.
        max_shard_size: of a weight file, such as `5GB`.
        gguf: also convert it with llama.cpp's converter.
        force: replace a model that is there.

    Raises:
        InputError: the adapter does not fit the base, or is of a kind that no weight of the base can hold, there is no
            converter, or something is at `out`.
    """
    folder, out = _adapter(Path(adapter)), Path(out)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    known = use.read(folder)
    quantise = quantise or (known.settings.get("quantise") if known else None)
    source = _source(folder, base or config.get("base_model_name_or_path"))
    _check_free(out, force, folder, source)
    converter = _converter() if gguf else None
    _check_kind(folder, config)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied and quantised weights, which are taken care of
        model, dtype, cast = _base(folder, config, source, dtype, quantise, known)
        names = {*model.state_dict()}
        model = load(model, folder).eval()
        untied, layers, rounding = False, 0, 0.0
        if isinstance(model, PeftModel):
            untied = _separate(model)
            layers, rounding = _merge_layers(model, DTYPES[dtype])
            model = _unloaded(model)
        if strange := {*model.state_dict()} - names:
            raise InputError(f"{folder}: adds {min(strange)} to the model, which transformers would not load")
        untied |= _untied(model)
        for parameter in model.parameters() if cast else ():  # no buffers: rotary frequencies stay fp32
            parameter.data = parameter.data.to(DTYPES[dtype])
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(out, folder=True) as temporary:
            new = temporary / "model"
            model.save_pretrained(new, max_shard_size=max_shard_size)
            if untied:
                _check_untied(model, new)
            _copy_processor(folder, source, new)
            file = _to_gguf(converter, new, dtype) if converter else None
            files = tuple(sorted(path.name for path in new.glob("*.safetensors")))
            replace_folder(out, new)
    return Merged(out, type(model).__name__, layers, dtype, rounding, untied, files, out / file if file else None)


def _adapter(path: Path) -> Path:
    """The folder of an adapter, which may be that of a run."""
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in (CONFIG, DESCRIPTION)):
            return check_files(folder)
    require(not path.is_file(), f"{path}: is a file; give the folder of a PEFT adapter")
    raise InputError(f"{path}: holds no adapter: it has neither {CONFIG} nor {DESCRIPTION}")


def _source(folder: Path, base: str | None) -> str:
    """What transformers can load the base model from."""
    if not base:
        raise InputError(f"{folder}: does not say what its base model is; give it with --base")
    if is_gguf(base):
        return str(folder_of(base))
    path = Path(base).expanduser()
    if path.is_dir():
        return str(check_files(path))
    if path.is_absolute() or base.startswith((".", "~")):
        raise InputError(f"{base}: there is no such folder; give that of the base model with --base")
    return base


def _check_free(out: Path, force: bool, folder: Path, source: str) -> None:
    """Raise InputError unless `out` is new or empty, or holds a model and `force` is given."""
    for kept in (folder, Path(source)):
        if kept.exists() and (out.resolve() == kept.resolve() or out.resolve() in kept.resolve().parents):
            raise InputError(f"{out}: holds {kept.name}, which is to be merged; give another name")
    require(out.is_dir() or not out.exists(), f"{out}: is a file; give another name")
    if out.is_dir() and any(out.iterdir()):
        require(force, f"{out}: is there already; give another name, or --force to replace it")
        own = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
        require(own, f"{out}: holds something other than a model, which would be lost; give another name")


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError for adapters that no weight of the base model can hold, and starts that cannot be repeated."""
    if config.get("is_prompt_learning") or str(config.get("peft_type")).endswith(("TUNING", "PROMPT")):
        raise InputError(f"{folder}: {config['peft_type']} adds virtual tokens, which are no weights of the base model")
    if config.get("alora_invocation_tokens"):
        raise InputError(f"{folder}: aLoRA changes only what follows its invocation tokens, so it cannot be merged")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(RESIDUAL) and start not in REPEATABLE:
        raise InputError(
            f"{folder}: its start, {start}, has changed the base weights and cannot be repeated: save it with PEFT's "
            "path_initial_model_for_weight_conversion, and merge that"
        )


def _base(
    folder: Path, config: dict[str, Any], source: str, dtype: str | None, quantise: str | None, known: Use | None
) -> tuple[Any, str, bool]:
    """The base model with a head of the right size, de-quantised, the dtype to save it in, and if it has another."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype: there is no {dtype!r}{nearest(dtype, DTYPES)}; one of {', '.join(DTYPES)}")
    require(quantise in (None, "none", "4bit", "8bit"), f"quantise: there is no {quantise!r}; one of 4bit, 8bit, none")
    shapes = _shapes(folder)
    try:
        found = AutoConfig.from_pretrained(source)
        kind = _kind(config, found)
        skeleton = _sized(kind, found, shapes)
        codes: Any = getattr(found, "quantization_config", None)
        if codes is None and quantise in ("4bit", "8bit"):
            heads = sorted({name.partition(".")[0] for name in shapes if ".lora_" not in name})
            codes = quantisation(quantise, torch.float32, skeleton, heads)
            options: dict[str, Any] = {"quantization_config": codes}
        else:
            options = {}
        own = _name(getattr(found, "dtype", None) or torch.float32)
        residual = str(config.get("init_lora_weights")).lower() in REPEATABLE
        exact = codes is not None or residual or (dtype or own) == "fp32"
        model, report = kind.from_pretrained(
            source,
            config=found,
            dtype=torch.float32 if exact else "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{source}: cannot be loaded as the base model: {' '.join(str(error).split())[:300]}"
        ) from error
    missing = {key if isinstance(key, str) else key[0] for key in (*report["missing_keys"], *report["mismatched_keys"])}
    if lost := sorted(missing - shapes.keys()):
        raise InputError(
            f"{folder}: neither it nor {source} has weights for {lost[0]} ({len(lost)} such tensors): give the base "
            "model that it was trained on with --base"
        )
    if known and known.base and codes is None and known.settings.get("dtype", "fp32") == "fp32":
        head = head_modules(model, missing) if kind.__name__.endswith("SequenceClassification") else []
        if base_digest(model, head) != known.base:
            raise InputError(
                f"{source}: has other weights than the model that {folder} was trained on: give that with --base"
            )
    if known and known.labels:
        model.config.id2label = dict(enumerate(known.labels))
        model.config.label2id = {word: place for place, word in enumerate(known.labels)}
    if codes is not None:
        keep_codes(model)
        model = model.dequantize(dtype=torch.float32)
        vars(model.config).pop("quantization_config", None)
        model.is_quantized = False
        model._weight_conversions = [  # saving would undo how codes are read
            step
            for step in vars(model).get("_weight_conversions") or ()
            if not any(".integrations." in type(part).__module__ for part in getattr(step, "operations", ()))
        ]
    _resize(model, shapes)
    return model, dtype or own, exact or dtype is not None


def _name(dtype: Any) -> str:
    """A dtype by its name here; what is none of DTYPES, such as fp8, is saved as bf16."""
    return next((name for name, each in DTYPES.items() if each == dtype), "bf16")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors in the adapter's file by their names in the base model."""
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: has no {WEIGHTS}: only safetensors are read; save the adapter again")
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = {name.removeprefix(PREFIX).replace(".base_layer.", "."): name for name in file.keys()}  # noqa: SIM118
        return {name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()}


def _kind(config: dict[str, Any], base: PreTrainedConfig) -> Any:
    """The class of the model that the adapter was trained on."""
    mapping = config.get("auto_mapping") or {}
    with suppress(ImportError, AttributeError, KeyError, ValueError):
        if str(mapping["parent_library"]).startswith("transformers."):
            return getattr(import_module(mapping["parent_library"]), mapping["base_model_class"])
    peft_kind = auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.get("task_type")), nn.Module)
    for each in vars(auto).values():
        if getattr(each, "_target_peft_class", None) is peft_kind and type(base) in each._target_class._model_mapping:
            return each._target_class
    for name in getattr(base, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise InputError("the class of the base model is not known: neither the adapter nor the base's config.json tells")


def _sized(kind: Any, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The model on the meta device; `config` gets the number of labels with which most tensors fit the adapter."""

    def with_labels(number: int) -> Any:
        if number != config.num_labels:
            config.num_labels = number
        with torch.device("meta"):
            return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)

    def fitting(number: int) -> int:
        return sum(tuple(value.shape) == shapes.get(name) for name, value in with_labels(number).state_dict().items())

    sizes = [config.num_labels or 1, *(shape[0] for name, shape in shapes.items() if len(shape) == 1)]
    return with_labels(max(dict.fromkeys(sizes), key=fitting))


def _resize(model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the embedding of the base as many rows as that in the adapter, which was trained with new tokens."""
    with suppress(NotImplementedError, AttributeError):
        table = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is table)
        rows = shapes.get(f"{name}.weight", (len(table.weight),))[0]
        if rows != len(table.weight):
            model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def _separate(model: PeftModel) -> bool:
    """Give each adapted layer a weight of its own; whether any was shared."""
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = False
    for layer in _tuned(model):
        module = layer.get_base_layer()
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and holders.get(id(weight), 0) > 1:
            holders[id(weight)] -= 1
            module.weight = nn.Parameter(weight.clone(), requires_grad=False)
            found = True
    return found


def _tuned(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def _merge_layers(model: PeftModel, dtype: torch.dtype) -> tuple[int, float]:
    """Merge layer by layer in fp32, and round to `dtype`; how many, and the error of rounding (`Merged.rounding`)."""
    count, error, added = 0, 0.0, 0.0
    for layer in _tuned(model):
        if not any(name in part for name in layer.active_adapters for part in _parts(layer)):
            continue
        base: Any = layer.get_base_layer()
        layer.float()
        before = {name: p.detach().clone() for name, p in base.named_parameters(recurse=False)}
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError, RuntimeError) as reason:
            raise InputError(f"PEFT cannot merge {type(layer).__name__}: {' '.join(str(reason).split())}") from reason
        base = layer.get_base_layer()
        count += 1
        for name, after in base.named_parameters(recurse=False):
            change = _square(after - before[name])
            added += change
            error += _square(after.to(dtype).float() - after) if change else 0.0
        base.to(dtype)
    return count, math.sqrt(error / added) if added else 0.0


def _parts(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name)]


def _square(values: Tensor) -> float:
    return values.double().square().sum().item()


def _unloaded(model: PeftModel) -> Any:
    """The base model without PEFT's layers, whose weights have been merged."""
    plain = model.base_model.unload()  # type: ignore[operator]
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(True)
        assert ".base_layer." not in name, name
    return plain


def _untied(model: Any) -> bool:
    """Whether embedding and output layer, tied in the configuration, have other weights now; it is then corrected."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return False
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(table, "weight", None) for table in tables)
    if first is None or last is None or first is last:
        return False
    if first.shape == last.shape and torch.equal(first, last):
        model.tie_weights()
        return False
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    return True


@torch.no_grad()
def _check_untied(model: Any, folder: Path) -> None:
    """Raise InputError where transformers ties the weights of the saved model again, or computes otherwise without."""
    again = type(model).from_pretrained(folder, dtype=model.dtype).eval()
    inputs = {
        name: value % model.config.get_text_config().vocab_size
        for name, value in model.dummy_inputs.items()
        if name in inspect.signature(model.forward).parameters and value.dtype == torch.long
    }
    expected, found = model.eval()(**inputs)[0], again(**inputs)[0]
    if (found - expected).abs().max() > MOST_ERROR * expected.abs().max():
        raise InputError(
            f"the adapter changes one of two modules with shared weights, which {type(model).__name__} cannot keep "
            "apart: leave the output layer and the embedding out of targets"
        )


def _copy_processor(folder: Path, source: str, out: Path) -> None:
    """Copy the tokenizer, or what else prepares inputs: the adapter's, else that of the base. Some have none."""
    for kind, place in ((AutoTokenizer, str(folder)), (AutoProcessor, source), (AutoTokenizer, source)):
        if place == str(folder) and not (folder / "tokenizer_config.json").is_file():
            continue
        with suppress(OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
            kind.from_pretrained(place).save_pretrained(out)
            return


def _converter() -> Path:
    """llama.cpp's converter: in the folder LLAMA_CPP, on the path, or where `make clients` has put it."""
    places = [Path(os.environ["LLAMA_CPP"]) / CONVERTER] if os.environ.get("LLAMA_CPP") else []
    places += [Path(found)] if (found := which(CONVERTER)) else []
    places += sorted(Path(".venv-clients").glob(f"source/*/vendor/llama.cpp/{CONVERTER}"))
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"--gguf: llama.cpp's {CONVERTER} is not there: set LLAMA_CPP to the folder of its source, or run make clients "
        "in a clone of rankwise"
    )


def _to_gguf(converter: Path, folder: Path, dtype: str) -> str:
    """Convert the saved model; the name of the file, which is put next to it."""
    name = f"model-{GGUF_TYPES[dtype]}.gguf"
    options: Sequence[str] = ("--outfile", str(folder / name), "--outtype", GGUF_TYPES[dtype])
    done = subprocess.run([sys.executable, str(converter), str(folder), *options], capture_output=True, text=True)
    if done.returncode or not (folder / name).is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"--gguf: {converter} cannot convert {json.dumps(folder.name)}: {reason[:300]}")
    return name
