"""Models in GGUF files: read as transformers reads them, kept once, and refused in one line where they cannot be."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import warm
from asserts import refused
from rankwise import methods, tasks
from rankwise.errors import InputError
from rankwise.settings import RunConfig, Schema, load
from rankwise.sweep.check import check_models, expand
from rankwise.train import gguf
from rankwise.train.model import build, label, quiet

WORDS = 256 + 4
needs_gguf = pytest.importorskip("gguf")


def write(file: Path, arch: str = "llama", pad: bool = True) -> Path:
    """A GGUF file of a small random decoder with a byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = needs_gguf.GGUFWriter(str(file), arch)
    width, inner, heads, kv = 32, 48, 4, 2
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_embedding_length, width),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, inner),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, kv),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, width // heads),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, WORDS),
    ):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if pad:
        writer.add_pad_token_id(2)
    draw = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (WORDS, width), "output_norm": (width,)}
    for block in range(2):
        own = {
            "attn_q": (width, width),
            "attn_k": (width * kv // heads, width),
            "attn_v": (width * kv // heads, width),
            "attn_output": (width, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
            "attn_norm": (width,),
            "ffn_norm": (width,),
        }
        shapes |= {f"blk.{block}.{name}": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        values = 0.2 * torch.randn(shape, generator=draw) + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rankwise" / "gguf"


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_file_is_read_as_transformers_reads_it(arch: str, tmp_path: Path) -> None:
    file = write(tmp_path / "small.gguf", arch)
    with quiet():
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        model, tokenizer, head = build(str(file), tasks.build("e2e"), 8)
    tokens = torch.tensor([tokenizer("a text, and one more")["input_ids"]])
    assert torch.equal(model.eval()(tokens).logits, stock.eval()(tokens).logits)
    assert head == [] and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")  # which a model that counts as quantised cannot be
    assert label(str(file)) == "small"


def test_a_file_that_is_first_counted_is_read_as_one_that_is_first_loaded(tmp_path: Path) -> None:
    """As `validate`, `train` and `compare` do on a machine where nothing is converted yet."""
    file = write(tmp_path / "small.gguf")
    check_models([RunConfig(task={"name": "e2e"}, model=str(file), max_length=64)], shipped=False)
    with quiet():
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        model, *_ = build(str(file), tasks.build("e2e"), 8)
    expected = dict(stock.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


def test_padding_is_not_the_token_that_ends_a_text(tmp_path: Path) -> None:
    """Padding is left out of the loss, and the end of a text must not be."""
    _, tokenizer, _ = build(str(write(tmp_path / "small.gguf")), tasks.build("e2e"), 8)
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_it_is_converted_once_and_again_after_damage(tmp_path: Path, cache: Path, capsys: Any) -> None:
    file = write(tmp_path / "small.gguf")
    folder = gguf.folder_of(str(file))
    assert folder.parent == cache and "de-quantised once" in capsys.readouterr().err
    before = (folder / "model.safetensors").stat()
    moved = file.rename(tmp_path / "elsewhere.gguf").rename(tmp_path / "small.gguf")
    assert gguf.folder_of(str(moved)) == folder
    assert (folder / "model.safetensors").stat() == before and capsys.readouterr().err == ""
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x7f")
    assert gguf.folder_of(str(file)) == folder
    assert (folder / "model.safetensors").stat() != before
    (folder / "config.json").unlink()
    gguf.folder_of(str(file))
    assert (folder / "config.json").exists()


def test_a_kill_while_converting_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "small.gguf")
    script = (
        "import os, signal, sys, transformers\n"
        "from rankwise.train import gguf\n"
        "save = transformers.PreTrainedModel.save_pretrained\n"
        "def killed(*args, **more):\n"
        "    save(*args, **more)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "transformers.PreTrainedModel.save_pretrained = killed\n"
        "gguf.folder_of(sys.argv[1])\n"
    )
    (tmp_path / "killed.py").write_text(script)
    done = warm.run([sys.executable, str(tmp_path / "killed.py"), str(file)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(cache.glob(".small*")) and not (cache / "small").exists()
    folder = gguf.folder_of(str(file))
    assert folder.is_dir() and not list(cache.glob(".small*"))


def test_two_processes_convert_it_once(tmp_path: Path) -> None:
    file = write(tmp_path / "small.gguf")
    (tmp_path / "one.py").write_text("import sys\nfrom rankwise.train import gguf\nprint(gguf.folder_of(sys.argv[1]))")
    command = [sys.executable, str(tmp_path / "one.py"), str(file)]
    both = [warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [each.communicate() for each in both]
    assert [each.returncode for each in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sorted(err.count("de-quantised once") for _, err in outputs) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"model: no file .*odd\.gguf"),
        (b"", r"odd\.gguf cannot be read as a GGUF file: "),
        (b"not a model", r"odd\.gguf cannot be read as a GGUF file: "),
        (b"GGUF\x03\0\0\0" + b"\xff" * 64, r"odd\.gguf cannot be read as a GGUF file: "),
    ],
)
def test_what_is_no_gguf_file_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    if content is not None:
        file.write_bytes(content)
    assert re.search(message, refused(lambda: build(str(file), tasks.build("e2e"), 8)))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_half_a_file_is_one_line(share: float, tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "half.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "half.gguf cannot be read as a GGUF file" in refused(lambda: gguf.folder_of(str(file)))
    assert not [each for each in cache.iterdir() if each.is_dir()]


def test_an_architecture_that_transformers_does_not_read_is_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "odd.gguf", "no-such-arch")
    assert "cannot be read as a GGUF file: " in refused(lambda: gguf.folder_of(str(file)))


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    said = refused(lambda: build("smollm2", tasks.build("e2e"), 8))
    assert said == f"model: smollm2 is not installed: {gguf.INSTALL}"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"gguf is not installed: pip install .*\[demo\]"):
        gguf.folder_of(str(write_nothing(tmp_path / "small.gguf")))


def write_nothing(file: Path) -> Path:
    file.write_bytes(b"GGUF")
    return file


def test_a_cache_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    said = refused(lambda: gguf.folder_of(str(write(tmp_path / "small.gguf"))))
    assert said.endswith("choose another folder with XDG_CACHE_HOME")


@pytest.mark.parametrize("name", ["e2e", "seq2seq", "causal"])
def test_a_task_that_generates_is_given_the_decoder_in_its_run_yaml(name: str) -> None:
    schema = Schema(methods.registry(), tasks.registry())
    task: dict[str, Any] = {"name": name, **({"dataset": "rows.csv"} if name != "e2e" else {})}
    config = load({"task": task}, [], schema)
    assert config.model == "smollm2"  # type: ignore[union-attr]
    for given, models in (
        ({"task": task, "vary": {"seed": [0]}}, {(name, "smollm2")}),
        ({"vary": {"task": [task, {"name": "cola"}]}}, {(name, "smollm2"), ("cola", None)}),
        ({"task": task, "vary": {"model": [None, "gpt2"]}}, {(name, "smollm2"), (name, "gpt2")}),
        ({"task": task, "vary": {"task.name": [name]}}, {(name, "smollm2")}),
        ({"vary": {"seed": [0]}, "chain": [{"task": task}, {"task": task}]}, {(name, "smollm2")}),
        ({"task": task, "vary": {"seed": [0]}, "tune": {"learning_rate": [1, 2]}}, {(name, "smollm2")}),
    ):
        runs = expand(load(given, [], schema))  # type: ignore[arg-type]
        assert {(each.task["name"], each.model) for each in runs} == models
        assert {each.after for each in runs} <= {None, *(each.id for each in runs)}
    assert load({"task": task, "model": "gpt2"}, [], schema).model == "gpt2"  # type: ignore[union-attr]
    assert load({"task": "cola"}, [], schema).model is None  # type: ignore[union-attr]


@pytest.mark.large
def test_the_embedded_decoder_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With its own tokens. It is converted into the cache of the user, which all tests share."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    try:
        model, tokenizer, _ = build("smollm2", tasks.build("e2e"), 64)
    except InputError as error:
        pytest.skip(str(error))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"
