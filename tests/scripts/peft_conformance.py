"""`make conformance`: runs PEFT's own LoRA tests with and without rankwise in their models, and counts the results.

The tests come with PEFT's source, which pip fetches; nothing of it is kept here. Models of the hub are replaced by
random ones of the same architecture. What stock PEFT does not pass on this machine is not asked of rankwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import transformers

import peft_ways

FILES = {
    "test_custom_models.py": "",
    "test_lora_conversion.py": "",
    "test_tuners_utils.py": "",
    "test_low_level_api.py": "",
    "test_initialization.py": " (hot swap)",
}
"""PEFT's files, and what of them is run."""
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 64}
DECODER = {**SMALL, "num_hidden_layers": 2, "intermediate_size": 32}
OPT = {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1}
HUB = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", "ForCausalLM", {**OPT, "num_hidden_layers": 5}),
    "peft-internal-testing/opt-125m": ("OPT", "ForCausalLM", {**OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "ForCausalLM", DECODER),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "ForCausalLM", DECODER),
    "hf-internal-testing/tiny-random-gpt2": (
        "GPT2",
        "LMHeadModel",
        {"n_embd": 16, "n_layer": 5, "n_head": 4, "vocab_size": 1000},
    ),
    "peft-internal-testing/tiny-random-t5": (
        "T5",
        "ForConditionalGeneration",
        {
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 1000,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5",
        "ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 1000},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoX", "ForCausalLM", DECODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "Bloom",
        "ForCausalLM",
        {"hidden_size": 16, "n_layer": 5, "n_head": 4, "vocab_size": 1000},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "Bart",
        "ForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "vocab_size": 1000,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", "Model", DECODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "Roberta",
        "ForSequenceClassification",
        DECODER,
    ),
}
"""Random models in the place of those on the hub: architecture, class, configuration."""

KINDS = ("passed", "untouched", "refused", "by design", "skipped", "set aside", "failed")
OMEGA = "ω is one more parameter, in fp32, and A is computed from it"
RAW = "the raw state of a search has names that fit no adapter"
SAVED = "rankwise.save writes safetensors, and a card of its own, or leaves a user's as it is, where PEFT adds metadata"
SPLIT = "PEFT adds the factors themselves, and a rank change splits the same product into others"
BY_DESIGN = {
    "in a search": {
        "lora_omega": OMEGA,
        "ParametrizedLinear": OMEGA,
        "leaf variables": OMEGA,
        "test_adapter_dtype_autocast.<locals>": OMEGA,
        "test_nb_params": OMEGA,
        "test_save_pretrained_warns_for_unsharded": OMEGA,  # which gives A another shape, without effect
        "test_model_status_with": OMEGA,
        "test_model_target_parameters_and_target_modules": OMEGA,
        "parametrizations.weight.original": RAW,
        "this is the state of a training": RAW,
        "test_get_peft_model_state_dict_removes": RAW,
        "test_model_without_peft_config": RAW,
        "with MiCA-MLP": RAW,  # one of the two models of these tests is in a search
        "test_hotswap_missing_key_works": RAW,
        "test_hotswap_allowed_when_other_adapter_merged": RAW,
        "test_save_pretrained_pickle": SAVED,
        "test_existing_model_card": SAVED,
        "test_non_existing_model_card": SAVED,  # which is shorter than PEFT's template
    },
    "ranks changed and back": {
        "test_add_weighted_adapter_with_different_scaling[linear-": SPLIT,
        "test_add_weighted_adapter_with_different_scaling[ties-": SPLIT,
        "test_add_weighted_adapter_with_different_scaling[magnitude_prune-": SPLIT,
        "test_add_weighted_adapter_subtraction": SPLIT,
    },
}
"""What cannot be as in stock PEFT: by way, words of the test's name or of its error, and why."""


def fetched(folder: Path) -> Path:
    """PEFT's source of the installed version, with what its tests need to run without a network."""
    source = folder / f"peft-{peft.__version__}"
    if not (source / "tests" / "__init__.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", "peft", "-d", folder, f"peft=={peft.__version__}"],
            check=True,
        )
        subprocess.run([*pip, "install", "--no-deps", "--target", folder / "also", "parameterized==0.9.0"], check=True)
        with tarfile.open(folder / f"peft-{peft.__version__}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        for name, (architecture, kind, options) in HUB.items():
            cached = folder / "hub" / f"models--{name.replace('/', '--')}"
            (cached / "refs").mkdir(parents=True, exist_ok=True)
            (cached / "refs" / "main").write_text("0" * 40)
            config = getattr(transformers, f"{architecture}Config")(**options)
            transformers.set_seed(0)
            getattr(transformers, architecture + kind)(config).save_pretrained(cached / "snapshots" / ("0" * 40))
        (source / "tests" / "__init__.py").touch()
    return source


def run(way: str, folder: Path, only: str) -> list[dict[str, Any]]:
    """What became of each test in one way; with `only`, of those whose names it selects."""
    source = fetched(folder)
    record = folder / f"{way.replace(' ', '-')}.jsonl"
    paths = [str(source.parent / "also"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    stock = [] if way == "stock" else ["--stock", folder / "stock.jsonl"]
    pytest = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-q", "--tb=short", "-W", "ignore"]
    plugin = ["-p", "no:cacheprovider", "-p", "peft_ways", "--way", way, "--record", record, *stock]
    command = [*pytest, *plugin, "-k", only, *(f"tests/{file}" for file in FILES)]
    subprocess.run(command, cwd=source, env={**os.environ, **environment}, stdout=sys.stderr, check=False)
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    if stock:
        passed = [row for row in map(json.loads, (folder / "stock.jsonl").open()) if row["outcome"] == "passed"]
        ran = {row["test"] for row in rows}
        rows += [{**row, "outcome": "failed", "reason": "it did not run"} for row in passed if row["test"] not in ran]
    return rows


def fate(row: dict[str, Any]) -> tuple[str, str]:
    """What became of a test: one of KINDS, and why."""
    reason = row["reason"]
    if row["outcome"] == "skipped":
        return ("skipped", "") if row["way"] == "stock" else ("failed", f"skipped: {reason}")
    if row["outcome"] == "passed":
        if row["way"] != "stock" and not row["touched"]:
            return "untouched", ""
        return ("refused", row["refused"][0]) if row["refused"] else ("passed", "")
    if row["way"] == "stock":
        return "set aside", "wants the hub" if "connect to" in reason or "StableDiffusion" in row["where"] else reason
    for words, why in BY_DESIGN.get(row["way"], {}).items():
        if words in f"{row['test']} {reason}":
            return "by design", why
    return "refused" if reason.startswith("InputError: ") and row["refused"] else "failed", reason


def table(rows: list[dict[str, Any]]) -> str:
    """The counts by file and way, and the reasons, as Markdown."""
    fates = {(row["way"], row["test"]): fate(row) for row in rows}
    found = Counter((Path(test.split("::")[0]).name, way, kind) for (way, test), (kind, _) in fates.items())
    head = ["file of PEFT's tests", "way", *KINDS]
    lines = [head, ["---", "---", *["---:"] * len(KINDS)]]
    for file, part in FILES.items():
        for way in dict.fromkeys(row["way"] for row in rows):
            lines.append([f"`{file}`{part}", way, *(f"{found[file, way, kind]:,}" for kind in KINDS)])
    out = ["| " + " | ".join(line) + " |" for line in lines]
    why = Counter((kind, " ".join(reason.split())[:150]) for kind, reason in fates.values() if reason)
    return "\n".join([*out, "", *(f"- {kind}, {n:,}: {reason}" for (kind, reason), n in sorted(why.items()))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("build/peft-tests"), help="what is fetched, and the records"
    )
    parser.add_argument("-k", default="", help="only tests with this in their names, as pytest selects them")
    parser.add_argument("--json", action="store_true", help="one line for each test")
    arguments = parser.parse_args()
    try:
        fetched(arguments.folder.absolute())
    except subprocess.CalledProcessError as error:
        print(f"PEFT's source cannot be fetched: {error}", file=sys.stderr)
        sys.exit(2)
    rows = [{"way": way, **row} for way in peft_ways.WAYS for row in run(way, arguments.folder.absolute(), arguments.k)]
    print("\n".join(map(json.dumps, rows)) if arguments.json else table(rows))
    sys.exit(any(fate(row)[0] == "failed" for row in rows))
