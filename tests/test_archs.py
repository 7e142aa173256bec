"""The configurations that ship: each builds the model whose parameters are known."""

import json
import subprocess
import sys

import pytest
import torch

from rankwise.archs import archs, find
from rankwise.errors import InputError
from rankwise.train.params import build

# arch: class, parameters in all, those of the module `base_model_prefix`
KNOWN = {
    "deberta-v3-base": ("DebertaV2ForSequenceClassification", 183_831_552 + 590_592 + 1_538, 183_831_552),
    "roberta-base": ("RobertaForSequenceClassification", 124_645_632 + 1_538, 124_645_632 - 590_592),
    "roberta-large": ("RobertaForSequenceClassification", 355_359_744 + 2_050, 355_359_744 - 1_049_600),
    "gpt2-medium": ("GPT2LMHeadModel", 354_823_168, 354_823_168),
    "gpt2-large": ("GPT2LMHeadModel", 774_030_080, 774_030_080),
    "gpt3-175b": ("GPT2LMHeadModel", 174_604_259_328, 174_604_259_328),
    "t5-small": ("T5ForConditionalGeneration", 60_506_624, 60_506_624),
    "llama-3.1-8b": ("LlamaForCausalLM", 8_030_261_248, 8_030_261_248 - 128_256 * 4_096),
    "minilm-l6": ("BertForSequenceClassification", 22_713_216 + 770, 22_713_216),
}


def test_every_configuration_is_known() -> None:
    assert set(archs()) == set(KNOWN)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_configuration_builds_the_model_that_is_known(name: str) -> None:
    built_as, total, base = KNOWN[name]
    arch = find(name)
    with torch.device("meta"):
        model = build(arch)
    assert type(model).__name__ == arch.built_as == built_as
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in getattr(model, model.base_model_prefix, model).parameters()) == base
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_deberta_has_the_relative_positions_of_version_3() -> None:
    with torch.device("meta"):
        model = build(find("deberta-v3-base"))
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert names["deberta.encoder.rel_embeddings.weight"] == (512, 768)
    assert "deberta.encoder.LayerNorm.weight" in names
    assert not any("position_embeddings" in name or "pos_key_proj" in name for name in names)


def test_a_configuration_has_its_size_at_hand() -> None:
    sizes = {name: (arch.layers, arch.width) for name, arch in archs().items()}
    assert sizes["gpt3-175b"] == (96, 12_288)
    assert sizes["t5-small"] == (6, 512)
    assert sizes["llama-3.1-8b"] == (32, 4_096)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"no such arch \(did you mean \"gpt2-medium\"\?\); known: deberta-v3-base, "):
        find("gpt2-medum")


def test_they_are_listed_without_torch() -> None:
    script = (
        "import sys; sys.argv = ['rankwise', 'archs', *sys.argv[1:]]\n"
        "from rankwise.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(done.stderr.split()) & {"torch", "transformers", "peft"}
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["arch", "built", "as", "layers", "width", "source"]
    assert [line.split()[0] for line in lines[2:]] == sorted(KNOWN)
    done = subprocess.run([sys.executable, "-c", script, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["t5-small"]["config"]["d_model"] == 512
    assert found["t5-small"]["built_as"] == "T5ForConditionalGeneration"
