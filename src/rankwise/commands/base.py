"""The base model that an adapter is merged into, with the weights that the adapter was trained on."""

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import auto
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from rankwise.adapters.beside import base_digest
from rankwise.adapters.peft_folder import PREFIX, WEIGHTS
from rankwise.adapters.save import REPEATABLE
from rankwise.errors import InputError, nearest, require
from rankwise.files import check_files
from rankwise.ranks.layers import holds_codes, keep_codes
from rankwise.runs.use import Use
from rankwise.train.arguments import DTYPES
from rankwise.train.gguf import folder_of, is_gguf
from rankwise.train.model import head_modules
from rankwise.train.quantise import quantisation

CODES = {"none": "a base that was not quantised", "4bit": "a base in 4 bits", "8bit": "a base in 8 bits"}
"""What `quantise` takes, in words."""


@dataclass(frozen=True)
class Base:
    """The base model of an adapter.

    Attributes:
        model: with a head of the adapter's size, de-quantised.
        dtype: what to save it in, a key of DTYPES.
        cast: whether its weights may have another dtype now.
        start: whether the adapter, when loaded, subtracts its start from the weights.
        assumed: what is not known of the weights that the adapter was trained on, and what to give; "" if all is.
    """

    model: Any
    dtype: str
    cast: bool
    start: bool
    assumed: str


def source_of(folder: Path, base: str | None) -> str:
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


def load_base(
    folder: Path, config: dict[str, Any], source: str, dtype: str | None, quantise: str | None, known: Use | None
) -> Base:
    """The base model of the adapter in `folder`, whose PEFT configuration is `config`; arguments as of `merge`."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype: there is no {dtype!r}{nearest(dtype, DTYPES)}; one of {', '.join(DTYPES)}")
    require(quantise is None or quantise in CODES, f"quantise: there is no {quantise!r}; one of 4bit, 8bit, none")
    own = known.settings.get("quantise", "none") if known else None
    if known and known.base and quantise not in (None, own):
        raise InputError(f"{folder}: was trained on {CODES[own or 'none']}: leave out --quantise {quantise}")
    quantise = quantise or own
    shapes = _shapes(folder)
    try:
        found = AutoConfig.from_pretrained(source)
        kind = _kind(config, found, known)
        skeleton = _sized(kind, found, shapes)
        codes: Any = getattr(found, "quantization_config", None)
        makes_codes = codes is None and quantise in ("4bit", "8bit")
        saved_in = _name(getattr(found, "dtype", None) or torch.float32)
        start = str(config.get("init_lora_weights")).lower() in REPEATABLE
        exact = codes is not None or start or (dtype or saved_in) == "fp32"
        options: dict[str, Any] = {"dtype": torch.float32 if exact else "auto"}
        if makes_codes and quantise:
            options["dtype"] = DTYPES[known.settings.get("dtype", "fp32") if known else "fp32"]  # what was quantised
            whole = sorted({name.removesuffix(".weight") for name in shapes if name.endswith(".weight")})
            codes = quantisation(quantise, options["dtype"], skeleton, [n for n in whole if ".lora_" not in n])
            options["quantization_config"] = codes
        model, report = kind.from_pretrained(
            source, config=found, ignore_mismatched_sizes=True, output_loading_info=True, **options
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
    if makes_codes:
        keep_codes(model)
    if known and known.base and (makes_codes or (codes is None and known.settings.get("dtype", "fp32") == "fp32")):
        head = head_modules(model, missing) if kind.__name__.endswith("SequenceClassification") else []
        if base_digest(model, head) != known.base:
            raise InputError(
                f"{source}: has other weights than the model that {folder} was trained on: give that with --base"
                + (", or merge on the kind of device that it was trained on" if makes_codes else "")
            )
    assumed = _assumed(model, quantise, known) if makes_codes or codes is None else ""
    if known and known.labels:
        model.config.id2label = dict(enumerate(known.labels))
        model.config.label2id = {word: place for place, word in enumerate(known.labels)}
    if codes is not None:
        keep_codes(model)
        model = model.dequantize(dtype=torch.float32).float()
        vars(model.config).pop("quantization_config", None)
        model.is_quantized = False
        model._weight_conversions = [  # saving would undo how codes are read
            step
            for step in vars(model).get("_weight_conversions") or ()
            if not any(".integrations." in type(part).__module__ for part in getattr(step, "operations", ()))
        ]
    _resize(model, shapes)
    return Base(model, dtype or saved_in, codes is not None or exact or dtype is not None, start, assumed)


def _assumed(model: nn.Module, quantise: str | None, known: Use | None) -> str:
    """`Base.assumed` of a model that is not saved in codes. The codes of a run are those of its digest."""
    if quantise is None:
        return "nothing says whether it was trained on a base in 4 or 8 bits: if so, give --quantise 4bit or 8bit"
    if quantise == "none" or (known and known.base):
        return ""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    whole = {name.rpartition(".")[2] for name, module in linear.items() if not holds_codes(module.weight)}
    kind = "NF4 with double quantisation" if quantise == "4bit" else "LLM.int8()"
    return (
        f"the base was quantised as {kind}, in all linear layers{' except ' if whole else ''}"
        f"{', '.join(sorted(whole))}: if the adapter was trained on a base quantised in another way, save that base "
        "with save_pretrained and give it with --base"
    )


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


def _kind(config: dict[str, Any], base: PreTrainedConfig, known: Use | None) -> Any:
    """The class of the model that the adapter was trained on."""
    if known and known.form in ("class", "value"):
        return transformers.AutoModelForSequenceClassification
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
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # it has no vocabulary, as ResNet, or none in one table, as CANINE
        return
    name = next((name for name, module in model.named_modules() if module is table), None)
    weight = getattr(table, "weight", None)  # none in a ViT, whose patches go through a convolution
    rows = shapes.get(f"{name}.weight", (0,))[0]
    if not isinstance(weight, Tensor) or rows in (0, len(weight)):
        return
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)
    except (NotImplementedError, AttributeError, TypeError) as error:  # of I-BERT and xLSTM in transformers 5.23
        raise InputError(
            f"the adapter has {rows} rows of the vocabulary, the base {len(weight)}, which transformers cannot change "
            f"for {type(model).__name__}"
        ) from error
