"""Files of other trainers as ours: what is carried over, what is not and why, and that no key is lost on the way.

The cases are written after the examples that come with axolotl (067b021c8) and LLaMA-Factory (ff6d4d12e); each says
which of them has these values.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from asserts import refused
from models import llama, write_llama
from rankwise import methods, tasks
from rankwise.errors import InputError
from rankwise.foreign import adapter, axolotl, carried, llama_factory
from rankwise.foreign.carried import NOTHING, Carried
from rankwise.ranks import sites
from rankwise.settings import RunConfig, Schema, load, parse_yaml

Cli = Callable[..., tuple[int, str, str]]


def run(file: Path, content: Any) -> tuple[Carried, RunConfig]:
    """What a file with this content becomes, and our settings as they are read again from the text."""
    file.write_text(json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content), encoding="utf-8")
    found = carried(file)
    config = load(parse_yaml(found.text(file)), [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(config, RunConfig)
    return found, config


def values(config: RunConfig, keys: Any) -> dict[str, Any]:
    """Dotted settings of a run."""

    def value(key: str) -> Any:
        head, _, rest = key.partition(".")
        return getattr(config, head)[rest] if rest else getattr(config, head)

    return {key: value(key) for key in keys}


BASE = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}],
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "sequence_len": 2048,
    "learning_rate": 2e-4,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
}
AXOLOTL: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "llama-3/lora-8b": (
        {"load_in_8bit": True, "lora_modules_to_save": ["embed_tokens", "lm_head"], "optimizer": "adamw_bnb_8bit"},
        {"quantise": "8bit", "method.rank": 16, "method.alpha": 32.0, "method.targets": "all-linear", "dtype": "bf16"},
        {"lora_modules_to_save", "optimizer"},
    ),
    "llama-2/qlora": (
        {"adapter": "qlora", "load_in_4bit": True, "lora_dropout": 0.05, "num_epochs": 4, "warmup_steps": 10},
        {"quantise": "4bit", "method.dropout": 0.05, "epochs": 4.0, "warmup": 10, "schedule": "cosine"},
        set(),
    ),
    "compiled": ({"torch_compile": True, "bf16": False}, {"compile": True, "dtype": "fp32"}, set()),
    "llama-3/lora-1b-kernels with liger": (
        {
            "liger_fused_linear_cross_entropy": True,
            "liger_rope": True,
            "liger_rms_norm": False,
            "lora_mlp_kernel": True,
        },
        {"activation_memory": "lean"},
        set(),
    ),
    "compiled, with fewer logits at once": (
        {"torch_compile": True, "cut_cross_entropy": True, "liger_glu_activation": False},
        {"activation_memory": "plain", "compile": True},
        {"cut_cross_entropy"},
    ),
    "fp16, with fewer logits at once": (
        {"fp16": True, "chunked_cross_entropy": True, "chunked_cross_entropy_num_chunks": 8},
        {"activation_memory": "plain", "dtype": "fp16"},
        {"chunked_cross_entropy"},
    ),
    "weights of tokens": (
        {"liger_fused_linear_cross_entropy": True, "liger_use_token_scaling": True},
        {"activation_memory": "lean"},
        {"liger_use_token_scaling"},
    ),
    "compiled on 8 bits": (
        {"torch_compile": True, "load_in_8bit": True},
        {"compile": False, "quantise": "8bit"},
        {"torch_compile"},
    ),
    "llama-3/qlora on weights of 4 bits": (
        {"adapter": "qlora", "load_in_4bit": True, "base_model": "unsloth/Meta-Llama-3.1-8B-bnb-4bit"},
        {"quantise": "none", "model": "unsloth/Meta-Llama-3.1-8B-bnb-4bit"},
        {"load_in_4bit"},
    ),
    "llama-2/fft_optimized": (
        {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None, "bf16": "auto"},
        {"method.name": "full", "autocast": "bf16", "dtype": "fp32"},
        set(),
    ),
    "mistral/lora": (
        {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj", "q_proj"], "sample_packing": True},
        {"method.targets": ["q_proj", "v_proj"], "packing": True, "batch_size": 8, "micro_batch": 2},
        set(),
    ),
    "qwen2-vl/lora-7b": (
        {"lora_target_linear": None, "lora_target_modules": r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj"},
        {"method.targets": "all-linear"},
        {"lora_target_modules"},
    ),
    "gemma3/gemma-3-1b-qlora": (
        {
            "datasets": [{"path": "cgato/SlimOrcaDedupCleaned", "type": "chat_template", "field_messages": "turns"}],
            "chat_template": "gemma3",
            "eot_tokens": ["<end_of_turn>"],
        },
        {"task.name": "chat", "task.columns": {"messages": "turns"}, "task.dataset": "cgato/SlimOrcaDedupCleaned"},
        {"chat_template"},
    ),
    "phi/lora-3.5": (
        {"lr_scheduler": "linear", "tf32": True, "seed": 7, "weight_decay": "0.1", "max_grad_norm": 0.5},
        {"schedule": "linear", "seed": 7, "weight_decay": 0.1, "clip": 0.5},
        {"tf32"},
    ),
    "openllama-3b/qlora": (
        {"flash_attention": True, "gradient_checkpointing": True, "wandb_project": "mine", "wandb_name": "first"},
        {"attention": "flash_attention_2", "gradient_checkpointing": True, "report_to": ["wandb"]},
        set(),
    ),
    "cerebras/btlm-ft": (
        {"adapter": None, "pretraining_dataset": [{"path": "allenai/c4", "type": "pretrain"}], "datasets": None},
        {"task.name": "text", "task.dataset": "allenai/c4"},
        {"lora_r", "lora_alpha", "lora_target_linear"},
    ),
    "llama-3/lora-1b-deduplicate-sft": (
        {
            "datasets": [
                {"path": "json", "data_files": "rows.jsonl", "type": {"field_instruction": "q", "field_output": "a"}},
                {"path": "other", "type": "alpaca"},
            ],
            "dataset_exact_deduplication": True,
        },
        {"task.name": "instruct", "task.dataset": "rows.jsonl", "task.columns": {"instruction": "q", "output": "a"}},
        {"datasets[1]", "dataset_exact_deduplication"},
    ),
    "rslora and DoRA": (
        {"peft_use_rslora": True, "peft_use_dora": True, "lora_r": 16, "lora_alpha": 8},
        {"method.name": "dora", "method.alpha": 32.0},
        set(),
    ),
    "noise": (
        {"neftune_noise_alpha": 5, "adam_eps": 1e-6},
        {"trainer": {"neftune_noise_alpha": 5.0, "adam_epsilon": 1e-6}},
        set(),
    ),
    "noise on packed rows": (
        {"neftune_noise_alpha": 5, "sample_packing": True, "adam_beta2": 0.95},
        {"packing": True, "trainer": {"adam_beta2": 0.95}},
        {"neftune_noise_alpha"},
    ),
    "pythia/lora": (
        {"lr_scheduler": "constant", "warmup_steps": 20, "evals_per_epoch": 0, "max_steps": 1000, "eval_steps": 50},
        {"schedule": "constant", "warmup": 0, "max_steps": 1000, "eval_every": 50},
        {"warmup_steps"},
    ),
}
FACTORY_BASE = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "mine",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "bf16": True,
}
FACTORY: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "train_lora/qwen3_lora_sft": (
        {"lora_rank": 8, "lora_target": "all", "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "max_samples": 1000},
        {"method.rank": 8, "method.alpha": 16.0, "method.targets": "all-linear", "schedule": "cosine", "warmup": 0.1},
        set(),
    ),
    "train_lora/qwen3_lora_pretrain": (
        {"stage": "pt", "dataset": "corpus"},
        {"task.name": "text", "task.dataset": "c4.jsonl", "task.columns": {"text": "document"}},
        set(),
    ),
    "train_lora/qwen3_lora_sft_ds3": ({"deepspeed": "examples/deepspeed/ds_z3_config.json"}, {}, {"deepspeed"}),
    "train_qlora/qwen3_lora_sft_otfq": (
        {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
        {"quantise": "4bit"},
        {"double_quantization"},
    ),
    "train_full/qwen3_full_sft": (
        {"finetuning_type": "full"},
        {"method.name": "full", "autocast": "bf16", "dtype": "fp32", "batch_size": 8, "micro_batch": 1},
        set(),
    ),
    "liger": ({"enable_liger_kernel": True}, {"activation_memory": "lean"}, set()),
    "liger in fp16": (
        {"enable_liger_kernel": True, "bf16": False, "fp16": True},
        {"activation_memory": "plain", "dtype": "fp16"},
        {"enable_liger_kernel"},
    ),
    "extras/llama_pro": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 8},
        {"method.name": "full-top", "method.blocks": 8},
        set(),
    ),
    "extras/pissa": (
        {"pissa_init": True, "pissa_iter": 16, "pissa_convert": True, "lora_alpha": 16},
        {"method.name": "pissa", "method.alpha": 16.0},
        {"pissa_iter", "pissa_convert"},
    ),
    "noise on packed rows": (
        {"neftune_noise_alpha": 5, "packing": True, "adam_beta2": 0.95},
        {"packing": True, "trainer": {"adam_beta2": 0.95}},
        {"neftune_noise_alpha"},
    ),
    "extras/oft": ({"finetuning_type": "oft", "oft_block_size": 32}, {"method.name": "lora"}, {"finetuning_type"}),
    "extras/loraplus": ({"loraplus_lr_ratio": 16.0}, {"method.name": "lora"}, {"loraplus_lr_ratio"}),
    "a conversation": (
        {"dataset": "talk, mine", "flash_attn": "fa2", "neat_packing": True, "lora_target": "q_proj,v_proj"},
        {"task.name": "chat", "task.columns": {"messages": "turns"}, "attention": "flash_attention_2", "packing": True},
        {"dataset: mine", "tags.user_tag"},
    ),
    "no data set of that name": ({"dataset": "unknown"}, {"task.dataset": "unknown.json"}, {"dataset: unknown"}),
    "its own defaults": (
        {"learning_rate": None, "gradient_accumulation_steps": None, "per_device_train_batch_size": None},
        {"learning_rate": 5e-5, "batch_size": 8, "schedule": "linear", "warmup": 0, "gradient_checkpointing": True},
        set(),
    ),
}
INFO = {
    "mine": {"file_name": "mine.jsonl"},
    "corpus": {"file_name": "c4.jsonl", "columns": {"prompt": "document"}},
    "talk": {
        "file_name": "talk.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "person", "assistant_tag": "assistant"},
    },
}


@pytest.mark.parametrize("name", AXOLOTL)
def test_files_of_axolotl(tmp_path: Path, name: str) -> None:
    content, expected, lost = AXOLOTL[name]
    found, config = run(tmp_path / "axolotl.yml", {**BASE, **content})
    assert values(config, expected) == expected
    assert lost <= found.lost.keys(), found.lost
    assert config.model == {**BASE, **content}["base_model"] and config.max_length == 2048


@pytest.mark.parametrize("name", FACTORY)
def test_files_of_llama_factory(tmp_path: Path, name: str) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    content, expected, lost = FACTORY[name]
    if "task.dataset" in expected:
        expected = {**expected, "task.dataset": str(tmp_path / expected["task.dataset"])}
    found, config = run(tmp_path / "factory.yaml", {**FACTORY_BASE, "dataset_dir": str(tmp_path), **content})
    assert values(config, expected) == expected
    assert lost <= found.lost.keys(), found.lost


def test_the_data_is_found_from_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its examples are to be started in the folder above theirs, which has data/dataset_info.json."""
    for folder in ("data", "examples/train_lora", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    file = tmp_path / "examples" / "train_lora" / "one.yaml"
    monkeypatch.chdir(tmp_path)
    assert run(file.relative_to(tmp_path), FACTORY_BASE)[1].task["dataset"] == "data/mine.jsonl"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(file, FACTORY_BASE)[1].task["dataset"] == str(tmp_path / "data" / "mine.jsonl")


def keys_of(module: Any) -> list[str]:
    """Keys that a module reads or knows, as they stand in its source."""
    import ast
    import inspect

    words = [node.value for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Constant)]
    return sorted(
        {word.rstrip("*") for word in words if isinstance(word, str) and word.replace("*", "").isidentifier()}
    )


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # which are refused when a file is read
ANY = (
    st.none()
    | st.booleans()
    | st.integers(-3, 99)
    | st.floats(0, 2)
    | st.text(LETTERS, max_size=12)
    | st.lists(st.text(LETTERS, max_size=5))
)
CASES = [
    (axolotl, BASE, {*axolotl.OTHER_AIMS, "datasets", "pretraining_dataset"}),
    (llama_factory, FACTORY_BASE, {"stage", "dataset", "do_predict"}),
    (adapter, {"peft_type": "LORA", "task_type": "CAUSAL_LM"}, {"peft_type"}),
]


@pytest.mark.parametrize(
    "module, base, fixed",
    [
        pytest.param(*CASES[0], id="axolotl", marks=pytest.mark.large),
        pytest.param(*CASES[1], id="LLaMA-Factory", marks=pytest.mark.large),
        pytest.param(*CASES[2], id="PEFT"),
    ],
)
@given(data=st.data())
@settings(max_examples=150)
def test_no_key_is_lost_and_the_text_says_what_the_settings_are(
    module: Any, base: dict[str, Any], fixed: set[str], data: st.DataObject
) -> None:
    keys = st.sampled_from(keys_of(module)) | st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
    more = data.draw(st.dictionaries(keys.filter(lambda key: key not in fixed), ANY, max_size=12))
    found = Carried("somebody", Path("theirs.yaml"), {**base, **more})
    try:
        module.carry(found)
    except InputError as error:
        assert "\n" not in str(error)
        return
    became = found.as_json()
    parts = [set(became[part]) & found.content.keys() for part in ("carried", "not_carried", "meaningless")]
    assert set.union(*parts) == found.content.keys()
    assert sum(map(len, parts)) == len(found.content)
    unknown = {key for key in more if key not in keys_of(module) and found.given(key) and more[key] is not False}
    for key in unknown - found.lost.keys():
        assert key in found.meaningless  # by a pattern, such as wandb_*
    nested: dict[str, Any] = {}
    for setting, value in found.settings.items():
        head, dot, rest = setting.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
        else:
            nested[head] = value
    assert parse_yaml(found.text(Path("ours.yaml"))) == nested


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 9, "lora_alpha": 3, "use_rslora": True, "use_dora": True, "target_modules": ["o_proj"]},
        {"r": 4, "lora_dropout": 0.1, "init_lora_weights": "gaussian", "target_modules": ["k_proj"]},
    ],
)
def test_what_an_adapter_becomes_adapts_the_same_layers_in_the_same_way(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base = write_llama(tmp_path / "base")
    LoraConfig(**options, task_type="CAUSAL_LM", base_model_name_or_path=str(base)).save_pretrained(str(tmp_path))
    found = carried(tmp_path / "adapter_config.json")
    config = load(parse_yaml(found.text(tmp_path)), [], Schema(methods.registry(), tasks.registry()))
    assert isinstance(config, RunConfig) and config.model == str(base)
    assert found.lost == {} and config.task["name"] == "chat"
    theirs = get_peft_model(llama(base), LoraConfig(**options, task_type="CAUSAL_LM"))
    with torch.random.fork_rng():
        ours = methods.build(config.method).attach(llama(base))
    assert {each.name: (each.rank, each.scaling) for each in sites(ours)} == {
        each.name: (each.rank, pytest.approx(each.scaling)) for each in sites(theirs)
    }
    modules = [module for module in ours.modules() if hasattr(module, "lora_dropout")]
    assert all(getattr(each.lora_dropout["default"], "p", 0.0) == options.get("lora_dropout", 0.0) for each in modules)
    assert all(bool(each.use_dora["default"]) == options.get("use_dora", False) for each in modules)


def test_adapters_that_others_have_published(tmp_path: Path) -> None:
    """What stands in some of them: a classifier's head, models of other kinds."""
    file = tmp_path / "adapter_config.json"
    usual = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q", "v"], "loftq_config": {}}
    usual |= {"rank_pattern": {}, "modules_to_save": None, "lora_bias": False, "eva_config": None, "bias": "none"}
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    found, config = run(file, {**usual, **head, "base_model_name_or_path": "bert-base-uncased"})
    assert found.lost == {} and config.task["name"] == "classification"
    whisper = {"base_model_class": "WhisperForConditionalGeneration", "parent_library": "transformers.models.whisper"}
    found, _ = run(file, {**usual, "task_type": None, "auto_mapping": whisper})
    assert found.lost.keys() == {"task_type", "auto_mapping"} and "WhisperFor" in found.lost["auto_mapping"]
    found, config = run(file, {**usual, "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "google/flan-t5-base"})
    assert found.lost == {} and (config.task["name"], config.model) == ("seq2seq", "google/flan-t5-base")


def test_what_an_adapter_has_beyond_ours_is_said(tmp_path: Path) -> None:
    made = LoraConfig(
        r=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}, target_modules=r".*\.(q|v)_proj", bias="all",
        modules_to_save=["lm_head"], init_lora_weights="olora", layers_to_transform=None, task_type="TOKEN_CLS",
    )  # fmt: skip
    made.save_pretrained(str(tmp_path))
    found = carried(tmp_path / "adapter_config.json")
    told = {
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "bias",
        "modules_to_save",
        "init_lora_weights",
        "task_type",
    }
    assert found.lost.keys() == told
    assert NOTHING not in found.lost.values()


@pytest.mark.parametrize(
    "content, message",
    [
        ({**BASE, "rl": "dpo"}, "rl is set, but rankwise trains on given answers only, not by rl"),
        ({**BASE, "datasets": []}, "it has no datasets, so there is nothing to train on"),
        ({**BASE, "datasets": [3]}, "datasets: expected a list of data sets, each with a path and a type"),
        ({**BASE, "lora_r": "many"}, "lora_r = 'many': expected a number"),
        (
            {**BASE, "micro_batch_size": 0, "batch_size": 8, "gradient_accumulation_steps": 0},
            "micro_batch = 0: expected greater than or equal to 1",
        ),
        ({**FACTORY_BASE, "dataset": " , "}, "dataset = ' , ': names none"),
        ({**BASE, "lora_alpha": "NaN"}, "lora_alpha = nan: expected a number"),
        ({**BASE, "lora_r": "1e999"}, "lora_r = inf: expected a number"),
        ({**BASE, "lora_r": 0}, "method lora: rank must be at least 1, not 0"),
        ({**FACTORY_BASE, "stage": "dpo"}, "stage is dpo, but rankwise trains on given answers only: sft and pt"),
        ({**FACTORY_BASE, "dataset": None}, "it trains nothing: it has no dataset, or do_predict"),
        ({"peft_type": "IA3"}, "peft_type is IA3, but only LORA can be imported; see rankwise methods"),
        (
            {"model": "gpt2", "peft_config": {"r": 8}},
            "is no configuration that can be imported: it has no key peft_type (PEFT's adapter_config.json) or "
            "base_model (axolotl) or model_name_or_path (LLaMA-Factory)",
        ),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(content))
    assert refused(lambda: carried(file)) == f"{file}: {message}"


def test_the_command_writes_lists_and_does_not_overwrite(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {
        **BASE,
        "base_model": "random-llama",
        "sequence_len": 64,
        "liger_rope": True,
        "relora": True,
        "wandb_watch": None,
    }
    Path("lora.yml").write_text(yaml.safe_dump(content))
    code, out, err = cli("import", "lora.yml")
    assert (code, err) == (0, "wrote lora-rankwise.yaml; next: rankwise validate lora-rankwise.yaml\n")
    assert "\n  relora: rankwise has nothing like it\n" in out and "liger_rope" in out.rpartition("without meaning")[2]
    text = Path("lora-rankwise.yaml").read_text()
    assert "#   relora: rankwise has nothing like it\n" in text and "  rank: 16  # lora_r, lora_alpha\n" in text
    code, out, err = cli("validate", "lora-rankwise.yaml")
    assert code == 0, err
    code, _, err = cli("import", "lora.yml")
    assert (code, err) == (2, "rankwise: lora-rankwise.yaml: is there already; give another name, -o FILE\n")
    assert Path("lora-rankwise.yaml").read_text() == text
    code, out, _ = cli("import", "lora.yml", "-o", "other.yaml", "--json")
    found = json.loads(out)
    assert code == 0 and found["file"] == "other.yaml" and "relora" in found["not_carried"]
    assert found["settings"]["method.rank"] == 16 and "wandb_watch" in found["meaningless"]
    assert cli("import", "nothing.json") == (2, "", "rankwise: nothing.json: there is no such file\n")
    assert cli("import", "lora.yml", "-o", "no/such/folder.yaml")[0] == 2


def test_what_stands_in_a_file_stays_in_its_comment_and_off_the_terminal(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {**BASE, "lr_scheduler": "rex\nseed: 5", "optimizer": "\x1b[2Jmuon", "output_dir": "a: b # c"}
    Path("lora.json.yml").write_text(yaml.safe_dump(content))
    code, out, _ = cli("import", "lora.json.yml", "-o", "ours.yaml")
    config = load("ours.yaml", [], Schema(methods.registry(), tasks.registry()))
    assert code == 0 and "\x1b" not in out + Path("ours.yaml").read_text()
    assert isinstance(config, RunConfig) and (config.seed, config.runs) == (0, "a: b # c")
