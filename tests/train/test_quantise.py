"""Runs on quantised weights: what they learn is exact again after a kill, and loads on the same base and on others."""

import re
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import methods
import runs
import warm
from asserts import refused
from rankwise import tasks
from rankwise.adapters import load
from rankwise.errors import installing
from rankwise.ranks.layers import holds_codes
from rankwise.results.rows import summarise
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from rankwise.sweep.check import Checked
from rankwise.tasks import Evaluation, subset
from rankwise.train.arguments import Loading
from rankwise.train.model import build, check, quiet
from rankwise.train.run import run
from runs import LORA, SIMPLEX, lines, make, start
from waiting import PATIENCE, reached, wait_for

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[dev]'")
KINDS = ("4bit", "8bit")
every_kind = pytest.mark.parametrize("kind", KINDS)
CANNOT = {
    **{("tinylora", kind): "tinylora decomposes weights" for kind in ("4bit", "8bit")},
    **{(name, kind): "quantised weights cannot train" for name in ("full", "full-top") for kind in KINDS},
    **{("pissa", kind): "is quantised, so its weight cannot change" for kind in KINDS},
    **({} if torch.cuda.is_available() else {("dora", "8bit"): "dora cannot run on 8-bit weights on a CPU"}),
}
"""Methods that codes are not for, and what they say."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.bert(tmp_path_factory.mktemp("base") / "bert", dropout=0.0)


def trained(folder: Path, **settings: Any) -> Path:
    run(make(folder, **settings))
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line]


def bare(base: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    return build(base, tasks.build("stdlib-kind"), 16, loading=Loading(quantise=kind))[0]


@pytest.mark.large
@every_kind
@methods.every_method
def test_each_method_learns_on_codes_and_loads_again_or_is_refused_before(
    name: str, kind: str, base: str, tmp_path: Path
) -> None:
    made = {**methods.OPTIONS.get(name, {}), "name": name}
    task = tasks.build("stdlib-kind")
    if said_of := CANNOT.get((name, kind)):
        said = refused(lambda: check(base, task, [methods.method(name)], 16, loading=Loading(quantise=kind)))
        assert said_of in said
        return
    check(base, task, [methods.method(name)], 16, loading=Loading(quantise=kind))
    folder = trained(tmp_path / "run", model=base, method=made, quantise=kind, max_steps=7, eval_every=3)
    evaluated = [line["eval"] for line in lines(folder / "metrics.jsonl") if "eval" in line]
    model = load(bare(base, kind), folder / "adapter")
    assert sum(holds_codes(p) for p in model.parameters()) == 12
    split = subset(task.evaluation()[0], 24)
    words = AutoTokenizer.from_pretrained(base)
    scored = task.evaluate(model, Evaluation(split, task.encode(split, words, 16)), words, 16, True)
    assert scored.metrics["loss"] == pytest.approx(evaluated[-1]["loss"], abs=2e-4)
    assert evaluated[0]["loss"] != evaluated[-1]["loss"]


@pytest.mark.large
@every_kind
def test_a_search_on_codes_that_is_killed_ends_as_the_uncut_one(kind: str, base: str, tmp_path: Path) -> None:
    settings = {"model": base, "method": SIMPLEX, "quantise": kind, "eval_every": 2, "max_steps": 40}
    alone, folder = (make(tmp_path / name, **settings) for name in ("alone", "run"))
    process = start(folder)
    wait_for(lambda: reached(folder, 5) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    undisturbed = start(alone)
    assert start(folder).wait(PATIENCE) == undisturbed.wait(PATIENCE) == 0, (folder / "log.txt").read_text()
    for name in ("metrics.jsonl", "ranks.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    tables = [pyarrow.parquet.read_table(each / "predictions.parquet") for each in (folder, alone)]
    assert tables[0].equals(tables[1])
    ranks = [line["ranks"] for line in lines(alone / "ranks.jsonl")]
    assert ranks[0] != ranks[-1]  # had they stood still, the above would prove little
    assert "MatMul8bitLt" not in (folder / "log.txt").read_text()


@pytest.mark.large
@every_kind
def test_an_evaluation_changes_nothing_in_the_training(kind: str, base: str, tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would round 4-bit scales and cut off all gradients from there on."""
    often, never = (
        trained(tmp_path / str(every), model=base, quantise=kind, eval_every=every, max_steps=6) for every in (1, 0)
    )
    assert losses(often) == losses(never)


def stock(base: str, kind: str) -> nn.Module:
    codes = BitsAndBytesConfig(
        load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit",
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["classifier", "bert.pooler"],
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, quantization_config=codes if kind != "none" else None
    )


STOCK = """
import sys
sys.modules["rankwise"] = None
import torch, transformers
from peft import PeftModel
from safetensors.torch import save_file
base, adapter, kind, out = sys.argv[1:]
codes = transformers.BitsAndBytesConfig(
    load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["classifier", "bert.pooler"],
)
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=3, quantization_config=None if kind == "none" else codes
)
model = PeftModel.from_pretrained(model, adapter).eval()
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.tensor([[101, 7592, 2088, 102]])).logits}, out)
"""


@pytest.mark.large
@every_kind
def test_stock_peft_reads_the_adapter_on_the_same_codes_and_near_on_plain_weights(
    kind: str, base: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = trained(tmp_path / "run", model=base, method=SIMPLEX, quantise=kind)
    with torch.no_grad():
        ours = (
            load(bare(base, kind), folder / "adapter").eval()(input_ids=torch.tensor([[101, 7592, 2088, 102]])).logits
        )
    for there, near in ((kind, 1e-6), ("none", 0.2)):
        command = [sys.executable, "-c", STOCK, base, str(folder / "adapter"), there, str(tmp_path / there)]
        done = warm.run(command, kind="stock", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        theirs = load_file(tmp_path / there)["logits"]
        assert torch.allclose(ours, theirs, atol=near, rtol=0), (there, ours, theirs)


@pytest.mark.large
def test_what_is_not_quantised_is_of_the_dtype_and_what_trains_is_fp32(base: str, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", model=base, dtype="bf16", quantise="4bit", method=SIMPLEX)
    exact = trained(tmp_path / "exact", model=base, method=SIMPLEX)
    assert torch.allclose(torch.tensor(losses(folder)), torch.tensor(losses(exact)), atol=0.1)
    model = build(base, tasks.build("stdlib-kind"), 16, loading=Loading(dtype="bf16", quantise="4bit"))[0]
    assert {p.dtype for p in model.parameters() if not holds_codes(p)} == {torch.bfloat16}
    assert not any(holds_codes(p) for p in model.classifier.parameters())


@pytest.mark.large
def test_the_setting_is_in_the_id_and_what_differs_by_it_is_not_compared(base: str, tmp_path: Path) -> None:
    task = {"name": "stdlib-kind"}
    assert RunConfig(task=task).id == RunConfig(task=task, quantise="none").id
    assert len({RunConfig(task=task, quantise=kind).id for kind in ("none", *KINDS)}) == 3  # type: ignore[arg-type]
    folders = [
        trained(tmp_path / name, id=f"{place}123456789ab", model=base, method=method, **more)
        for place, (name, method, more) in enumerate(
            [("lora", LORA, {}), ("codes", LORA, {"quantise": "4bit"}), ("simplex", SIMPLEX, {"quantise": "4bit"})]
        )
    ]
    [plain], [codes], [simplex] = (summarise(Store(tmp_path).results([each])) for each in folders)
    assert simplex.setting == codes.setting != plain.setting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantise": "4bit", "method": "full"}, "quantised weights cannot train"),
        ({"quantise": "8bit", "method": {"name": "full-top", "blocks": 1}}, "quantised weights cannot train"),
        ({"quantise": "4bit", "method": "pissa"}, "is quantised, so its weight cannot change"),
        ({"quantise": "4bit", "method": {"name": "lora", "init": "svd_residual"}}, "so its weight cannot change"),
        ({"quantise": "8bit", "method": {**SIMPLEX, "empty": "merge"}}, "so its weight cannot change"),
        ({"quantise": "4bit", "model": "random-bert"}, "quantise: random-bert has random weights"),
        ({"quantise": "4bit", "task": {"type": "segmentation", "dataset": "."}}, "quantise and attention: not for seg"),
        ({"quantise": "4bit", "dtype": "bf16", "method": "bitfit"}, "would round .*bias, which trains, to bf16: use"),
        (
            {"quantise": "8bit", "autocast": "bf16", "method": "bitfit"},
            "would round .*bias, which trains, to bf16: use",
        ),
        ({"quantise": "4 bit"}, "quantise = '4 bit': expected 'none', '8bit' or '4bit'"),
        ({"quantise": 4}, "quantise = 4: expected 'none', '8bit' or '4bit'"),
    ],
)
def test_what_cannot_be_done_with_codes_is_refused_in_one_line(
    settings: dict[str, Any], message: str, base: str
) -> None:
    given = {"task": "stdlib-kind", "model": base, "max_length": 16, **settings}
    said = refused(lambda: Checked.of(given, []))
    assert re.search(message, said), said


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = refused(lambda: Checked.of({"task": "stdlib-kind", "model": base, "max_length": 16, "quantise": "4bit"}, []))
    assert said == f"bitsandbytes is not installed: {installing('quantised')}"


def test_a_model_that_is_quantised_already_is_refused(base: str, tmp_path: Path) -> None:
    with quiet():
        stock(base, "4bit").save_pretrained(tmp_path / "codes")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "codes")
    settings = {"task": "stdlib-kind", "model": str(tmp_path / "codes"), "max_length": 16, "quantise": "4bit"}
    assert "is quantised already; leave it out" in refused(lambda: Checked.of(settings, []))


def test_a_stage_that_takes_over_all_weights_cannot_hold_them_as_codes(base: str) -> None:
    def checked(*methods: str) -> Checked:
        chain = [{"method": methods[0]}, {"method": methods[1], "quantise": "4bit"}]
        settings = {"task": "stdlib-kind", "model": base, "max_length": 16, "vary": {"seed": [0]}}
        return Checked.of({**settings, "chain": chain}, [])

    said = refused(lambda: checked("full", "lora"))
    assert said.startswith("quantise: a stage of a chain that starts from the weights of full reads them as numbers")
    assert len(checked("lora", "lora").runs) == 2
