"""Adapters on disk, read and written without their base model."""

import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
import warm
from models import stirred
from rankwise.adapters.stored import Factors, stored, write
from rankwise.adapters.tensors import Tensors, write_tensors
from rankwise.files import tidy


class Kinds(nn.Module):
    """Every kind of layer that PEFT's LoRA adapts, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.second = Conv1D(8, 12)
        self.plain = nn.Conv2d(2, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.table(ids)).tanh())  # (2, 4, 8)
        x = self.grouped(self.plain(x.reshape(2, 2, 4, 4)))  # (2, 4, 4, 4)
        x = self.line(x.reshape(2, 4, 16)).reshape(2, 8, 8)
        return self.head(self.attention(x, x, x)[0])


IDS = torch.arange(8).reshape(2, 4)
LAYERS = ["table", "first", "second", "plain", "line"]
FIXED = ["grouped", "attention"]


def base():
    torch.manual_seed(0)
    return Kinds().eval()


def adapted(targets=(*LAYERS, *FIXED), **options):
    options = {"r": 4, "lora_alpha": 6, **options}
    model = get_peft_model(base(), LoraConfig(target_modules=list(targets), **options))
    return stirred(model).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS)


SHAPES_OF_BIASES = "ignore:Adapter 'default'. .* LoRA tensor"  # PEFT takes a bias for a broken matrix
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"first": 2, r"^l.*": 3, "attention": 2},
        "alpha_pattern": {"(first|second)": 9, "grouped": 1, "table": 2.5},
    },
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"first": 2, "plain": 6}, "alpha_pattern": {"line": 3}},
    "dora": {"use_dora": True, "targets": [name for name in LAYERS if name != "line"]},
    "lora_bias": {"lora_bias": True, "targets": ["first", "plain"], "use_rslora": True},
    "heads and biases": {"modules_to_save": ["head"], "bias": "all", "targets": LAYERS},
    "tokens": {"trainable_token_indices": {"table": [1, 2]}, "targets": ["first", "second"]},
    "a start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:fan_in_fan_out", SHAPES_OF_BIASES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_what_is_written_again_is_the_same_in_stock_peft(options, tmp_path):
    model = adapted(**options)
    model.save_pretrained(tmp_path / "a")
    found = stored(tmp_path / "a")
    for name in found.names:
        factors, layer = found.factors(name), model.get_submodule(f"base_model.model.{name}")
        product = (factors.scale * factors.B.double() @ factors.A.double()).float()
        own = layer.get_delta_weight("default")
        assert torch.allclose(product.T if own.shape[0] != factors.B.shape[0] else product, own.flatten(1), atol=1e-6)
        assert found.cost(name) == factors.cost and found.limit(name) == factors.limit
        assert found.rank(name) == factors.rank
    write(tmp_path / "b", found, ((name, found.factors(name)) for name in found.names))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "b").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert not config["use_rslora"] and not config["alpha_pattern"] and not config["exclude_modules"]
    assert sorted(config["target_modules"]) == sorted({name.split(".")[0] for name in found.layers})
    write(tmp_path / "c", stored(tmp_path / "b"), {name: stored(tmp_path / "b").factors(name) for name in found.names})
    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in "bc")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:fan_in_fan_out", SHAPES_OF_BIASES)
def test_other_ranks_load_in_stock_peft_and_do_what_they_say(tmp_path):
    model = adapted(use_rslora=True)
    model.save_pretrained(tmp_path / "a")
    found, draw = stored(tmp_path / "a"), torch.Generator().manual_seed(3)
    ranks = dict(zip(found.names, [0, 1, 5, 4, 2], strict=True))

    def random(name):
        old = found.factors(name)
        size = old.A.shape[1], old.B.shape[0]
        A, B = torch.randn(ranks[name], size[0], generator=draw), torch.randn(size[1], ranks[name], generator=draw)
        return Factors(A, B, 0.3, old.kernel, old.embedding)

    made = {name: random(name) for name in found.names}
    write(tmp_path / "b", found, made)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "b").eval()
    for name, rank in ranks.items():
        layer = loaded.get_submodule(f"base_model.model.{name}")
        assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer) == bool(rank), name
        if rank:
            own = layer.get_delta_weight("default")
            product = (0.3 * made[name].B @ made[name].A).float()
            product = product.T if own.shape[0] != made[name].B.shape[0] else product
            assert torch.allclose(product, own.flatten(1), atol=1e-6), name
    for name in ("attention", "grouped"):
        assert stored(tmp_path / "b").rank(name) == 4


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A small plain adapter."""
    folder = tmp_path_factory.mktemp("linear") / "a"
    adapted(["first", "head"]).save_pretrained(folder)
    return folder


def changed(folder, to, config=None, tensors=lambda known: known):
    """A copy of the adapter in `folder` with other values in its configuration, and other tensors."""
    to.mkdir()
    known = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**known, **(config or {})}))
    save_file(tensors(load_file(folder / "adapter_model.safetensors")), to / "adapter_model.safetensors")
    return to


A, B = (f"base_model.model.first.lora_{part}.weight" for part in "AB")
REFUSED = {
    "VeRA": ({"peft_type": "VERA"}, "peft_type is VERA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "its start, pissa_niter_4, is subtracted"),
    "QALoRA": ({"use_qalora": True}, "has use_qalora"),
    "parameters": ({"target_parameters": ["experts"]}, "has target_parameters"),
    "rank": ({"rank_pattern": {"first": 3}}, "adapter_config.json: says rank 3 of first, which has rank 4"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha of first is '16'"),
    "an endless alpha": ({"lora_alpha": float("inf")}, "lora_alpha of first is inf"),
    "a list for a pattern": ({"rank_pattern": ["first"]}, "a pattern in it cannot be read"),
    "a broken pattern": ({"alpha_pattern": {"(": 2}}, "a pattern in it cannot be read: missing"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_means_something_else_is_refused(config, message, linear, tmp_path):
    with pytest.raises(rw.InputError, match=message):
        stored(changed(linear, tmp_path / "b", config))


TENSORS = {
    "no B": (lambda t: {k: v for k, v in t.items() if k != B}, f"has {A}, but no B of that layer"),
    "other rank": (lambda t: {**t, B: t[B][:, :3].contiguous()}, "the shapes of first do not match"),
    "flat": (lambda t: {**t, A: t[A].flatten()}, "the shapes of first do not match"),
    "rank 0": (lambda t: {**t, A: t[A][:0], B: t[B][:, :0]}, "the shapes of first do not match"),
    "KaSA": (lambda t: {**t, "base_model.model.first.lora_diag": t[A][:, 0].clone()}, "no tensor of plain LoRA"),
    "with the adapter's name": (
        lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()},
        "lora_A.default.weight, which is no tensor of plain LoRA",
    ),
    "a search": (
        lambda t: {A.replace("weight", "parametrizations.weight.original"): t[A]},
        "holds the state of a training",
    ),
    "codes": (lambda t: {**t, A: t[A].char()}, "holds codes"),
    "nothing": (lambda t: {"base_model.model.head.bias": torch.ones(3)}, "adapts no layer"),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused(tensors, message, linear, tmp_path):
    with pytest.raises(rw.InputError, match=message):
        stored(changed(linear, tmp_path / "b", tensors=tensors))


def test_pickles_and_paths_out_of_the_folder_are_refused(linear, tmp_path):
    (tmp_path / "adapter_config.json").write_text((linear / "adapter_config.json").read_text())
    with pytest.raises(rw.InputError, match="has no adapter_model.safetensors"):
        stored(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(rw.InputError, match="adapter_model.bin: is a pickle"):
        stored(tmp_path)
    index = tmp_path / "adapter_model.safetensors.index.json"
    for name in ("../a.safetensors", "/etc/passwd", "adapter_model.bin", 3):
        index.write_text(json.dumps({"weight_map": {A: name}}))
        with pytest.raises(rw.InputError, match="which is no safetensors file in this folder"):
            stored(tmp_path)
    index.write_text(json.dumps({"weight_map": {A: "one.safetensors"}}))
    with pytest.raises(rw.InputError, match=r"one.safetensors: is missing"):
        stored(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(rw.InputError, match=r"one.safetensors: is damaged"):
        stored(tmp_path)
    for nothing in (tmp_path / "none", linear / "adapter_config.json", tmp_path.parent):
        with pytest.raises(rw.InputError, match=str(nothing)):
            stored(nothing)


def test_several_files_are_read_as_one(linear, tmp_path):
    (tmp_path / "adapter_config.json").write_text((linear / "adapter_config.json").read_text())
    whole = load_file(linear / "adapter_model.safetensors")
    names = {name: f"adapter_model-{place}.safetensors" for place, name in enumerate(whole)}
    for name, file in names.items():
        save_file({name: whole[name]}, tmp_path / file)
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    one, several = stored(linear), stored(tmp_path)
    assert one.names == sorted(several.names)
    for name in one.names:
        assert torch.equal(one.factors(name).A, several.factors(name).A)
    write(tmp_path / "whole", several, {name: several.factors(name) for name in one.names})
    assert load_file(tmp_path / "whole" / "adapter_model.safetensors").keys() == whole.keys()


def test_what_is_there_is_kept_unless_it_is_an_adapter_and_force_is_given(linear, tmp_path):
    found = stored(linear)
    everything = {name: found.factors(name) for name in found.names}
    out = tmp_path / "out"
    out.mkdir()
    write(out, found, everything)  # an empty folder
    with pytest.raises(rw.InputError, match="is there already; give another name, or --force"):
        write(out, found, everything)
    write(out, found, {"first": everything["first"]}, force=True)
    assert stored(out).names == ["first"]
    (tmp_path / "notes" / "more").mkdir(parents=True)
    with pytest.raises(rw.InputError, match="which would be lost"):
        write(tmp_path / "notes", found, everything, force=True)
    (out / "checkpoint-5").mkdir()  # as in a Trainer's folder
    with pytest.raises(rw.InputError, match="out: holds checkpoint-5, which would be lost"):
        write(out, found, everything, force=True)
    assert (out / "checkpoint-5").is_dir()
    with pytest.raises(rw.InputError, match="is a file"):
        write(linear / "adapter_config.json", found, everything, force=True)


def test_a_write_that_fails_leaves_nothing(linear, tmp_path):
    found = stored(linear)

    def broken():
        yield "first", found.factors("first")
        raise RuntimeError("the second one fails")

    out = write(tmp_path / "out", found, {"first": found.factors("first")})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="the second one fails"):
        write(out, found, broken(), force=True)
    assert stored(out).names == ["first"] and sorted(path.name for path in tmp_path.rglob("*")) == before
    first = found.factors("first")
    for wrong, message in (
        ({"first": Factors(first.A[:, :-1], first.B, 1.0)}, "its new factors are not"),
        ({"first": Factors(first.A[:0], first.B[:, :0], 1.0)}, "no layer would have any rank"),
        ({}, "no layer would have any rank"),
    ):
        with pytest.raises(rw.InputError, match=message):
            write(tmp_path / "new", found, wrong)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


KILLED = """
import sys, time
from rankwise.adapters.stored import stored, write
found = stored(sys.argv[1])
def slowly():
    yield "first", found.factors("first")
    print("half", flush=True)
    time.sleep(600)
write(sys.argv[2], found, slowly(), force=True)
"""


def test_a_write_that_is_killed_leaves_what_was_there(linear, tmp_path):
    found, out = stored(linear), tmp_path / "out"
    write(out, found, {"first": found.factors("first")})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for target in (out, tmp_path / "new"):
        command = [sys.executable, "-c", KILLED, str(linear), str(target)]
        with warm.Popen(command, kind="stock", stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "half\n"
            process.kill()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and not (tmp_path / "new").exists()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.filterwarnings(SHAPES_OF_BIASES)
def test_a_layer_with_more_than_factors_is_not_left_out(tmp_path):
    adapted(["first"], lora_bias=True).save_pretrained(tmp_path / "bias")
    adapted(["first"], use_dora=True).save_pretrained(tmp_path / "dora")
    for kind in ("bias", "dora"):
        found = stored(tmp_path / kind)
        first = found.factors("first")
        with pytest.raises(rw.InputError, match=r"first has a (bias|magnitude) besides A and B"):
            write(tmp_path / "out", found, {"first": Factors(first.A[:0], first.B[:, :0], 1.0)})
        with pytest.raises(rw.InputError, match="besides A and B, and a sum has no room for it"):
            found.check_linear("a sum")


def test_files_next_to_the_weights_go_with_them(linear, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((linear / name).read_bytes())
    for name in ("README.md", "tokenizer.json", "chat_template.jinja", "optimizer.pt", "trainer_state.json"):
        (tmp_path / name).write_text("{}")
    found = stored(tmp_path)
    everything = {name: found.factors(name) for name in found.names}
    kept = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    for card in (False, True):  # whose scores are those of the adapter as it was
        write(tmp_path / "out", found, everything, card=card, force=True)
        assert {path.name for path in (tmp_path / "out").iterdir()} == kept | ({"README.md"} if card else set())


MEMORY = """
import resource, sys
from rankwise.adapters.stored import stored, write
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
found = stored(sys.argv[1])
write(sys.argv[2], found, ((name, found.factors(name)) for name in found.names))
print(peak() - before)
"""


def test_a_large_adapter_takes_little_memory(tmp_path):
    rank, layers, header, place = 1000, 40, {}, 0
    for layer in range(layers):
        for part, shape in (("A", [rank, 600]), ("B", [600, rank])):
            end = place + 4 * rank * 600
            name = f"base_model.model.layers.{layer}.lora_{part}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, end]}
            place = end
    text = json.dumps(header).encode()
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)  # zeros that take no room on the disk
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "out")]
    done = warm.run(command, kind="stock", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.6 * place
    assert stored(tmp_path / "out").names == [f"layers.{layer}" for layer in range(layers)]


KINDS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1).filter(lambda n: n != "__metadata__"), st.tuples(KINDS, SHAPES), min_size=1))
def test_tensors_are_written_as_they_came(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("tensors")
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randint(0, 200, shape, generator=draw).to(kind) for name, (kind, shape) in kinds.items()}
    write_tensors(folder / "a", made.items(), lambda: {"format": "pt"})
    loaded, one_by_one = load_file(folder / "a"), Tensors([folder / "a"])
    assert loaded.keys() == made.keys() == one_by_one.shape.keys() and [*folder.iterdir()] == [folder / "a"]
    for name, tensor in made.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name])
        assert torch.equal(tensor, one_by_one[name]) and one_by_one.shape[name] == tensor.shape
        assert one_by_one.dtype[name] == tensor.dtype
    assert one_by_one.metadata == {"format": "pt"}
