"""What stock PEFT makes of saved adapters, in a process that cannot import rankwise."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import warm

SCRIPT = """
import sys
assert "rankwise" not in sys.modules
sys.modules["rankwise"] = None  # any import of it fails
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
kind, base, inputs, out, *adapters = sys.argv[1:]
found = {}
for adapter in adapters:
    base_model = getattr(transformers, kind).from_pretrained(base)
    model = PeftModel.from_pretrained(base_model, adapter).eval()
    with torch.no_grad():
        found[adapter] = model(**load_file(inputs)).logits
        found[adapter + " merged"] = model.merge_and_unload()(**load_file(inputs)).logits
save_file(found, out)
"""


def agrees(
    base: nn.Module, inputs: Mapping[str, Tensor], expected: Mapping[Path, Tensor], folder: Path, fresh: bool = False
) -> None:
    """Assert that each adapter of `expected` gives its logits on `base` to 1e-5, as it is and merged.

    Args:
        base: the pretrained model, untouched; `folder` takes it and what passes between the processes.
        fresh: start a new interpreter instead of forking one.
    """
    base.save_pretrained(folder / "base")
    save_file({name: values for name, values in inputs.items() if name != "labels"}, folder / "in")
    paths = [str(folder / part) for part in ("base", "in", "out")]
    command = [sys.executable, "-c", SCRIPT, type(base).__name__, *paths, *map(str, expected)]
    if fresh:
        done = subprocess.run(command, capture_output=True, text=True)
    else:
        done = warm.run(command, kind="stock", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(folder / "out")
    assert found.keys() >= {str(adapter) for adapter in expected}
    for adapter, logits in expected.items():
        for name in (str(adapter), f"{adapter} merged"):
            assert (found[name] - logits).abs().max() <= 1e-5, name


def code_of(adapter: Path) -> str:
    [code] = re.findall(r"^```python\n(.*?)^```", (adapter / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return str(code)


def carry_out(code: str, folder: Path) -> str:
    """The last line that a card's code prints in a process that cannot import rankwise."""
    barred = 'import sys\nassert "rankwise" not in sys.modules\nsys.modules["rankwise"] = None\n'
    command = [sys.executable, "-c", barred + code]
    done = warm.run(command, kind="stock", cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(done.stdout).splitlines()[-1]
