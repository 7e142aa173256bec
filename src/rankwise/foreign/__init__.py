"""Configurations of other trainers, as the nearest file of rankwise: axolotl, LLaMA-Factory, and adapters of PEFT.

Every key of such a file is carried over, not carried over for a reason, or without meaning here; see `Carried`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import InputError
from rankwise.files import read_json
from rankwise.foreign import adapter, axolotl, llama_factory
from rankwise.foreign.carried import Carried
from rankwise.settings import load, parse_yaml, read_yaml
from rankwise.sweep.check import schema

KINDS: dict[str, tuple[str, Callable[[Carried], None]]] = {
    "peft_type": ("PEFT's adapter_config.json", adapter.carry),
    "base_model": ("axolotl", axolotl.carry),
    "model_name_or_path": ("LLaMA-Factory", llama_factory.carry),
}
"""The key by which a file is known -> whose it is, and what carries it over."""


def carried(file: Path) -> Carried:
    """What a file of another trainer says, as settings of ours.

    Raises InputError for a file of no known kind, and for values that no run can have.
    """
    content = _content(file)
    for key, (source, carry) in KINDS.items():
        if key in content:
            found = Carried(source, file, content)
            carry(found)
            try:
                load(parse_yaml(found.text(file)), [], schema())
            except InputError as error:
                raise InputError(f"{file}: {error}") from None
            return found
    keys = " or ".join(f"{key} ({source})" for key, (source, _) in KINDS.items())
    raise InputError(f"{file}: is no configuration that can be imported: it has no key {keys}")


def _content(file: Path) -> Mapping[str, Any]:
    if file.suffix != ".json":
        return read_yaml(file)
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected keys and values, found a {type(content).__name__}")
    return content
