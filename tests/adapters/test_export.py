"""Adapters written for other programs, checked, and put on the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import models
import rankwise as rw
from models import stirred
from rankwise.adapters.consumers import CONSUMERS, sglang_fault
from rankwise.adapters.export import TARGETS
from rankwise.adapters.layouts import reading
from rankwise.adapters.stored import stored
from rankwise.adapters.verify import verified
from rankwise.cli import app
from rankwise.ranks import ranks


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folders of a Llama and of an adapter as PEFT writes it, with several ranks and scales and an empty layer."""
    folder = tmp_path_factory.mktemp("mixed")
    base = models.write_llama(folder / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
        task_type="CAUSAL_LM",
    )
    stirred(get_peft_model(models.llama(base), config)).save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def delta(adapter, name):
    factors = adapter.factors(name)
    return factors.scale * factors.B @ factors.A


@pytest.mark.parametrize("to", [name for name in TARGETS if name != "diffusers"])
def test_what_is_written_is_the_same_adapter(to, mixed, tmp_path):
    done = rw.export_adapter(mixed, tmp_path / "out", to)
    like, written = stored(mixed), stored(tmp_path / "out")
    for name in like.names:
        assert torch.allclose(delta(written, name), delta(like, name), atol=1e-6)
    assert done.layout == TARGETS[to] and not done.notes and done.verified is None
    assert done.as_json()["ranks"] == [2, 4] and len(done.ranks) == 3
    assert done.as_json()["padded"] == (0 if done.layout == "compact" else 8)
    assert len(written.tensors.shape) == (6 if done.layout == "compact" else 8)
    wrong = {name for name, how in done.not_served.items() if how == "wrong"}
    assert ("vLLM up to 0.31" in wrong) == (done.layout == "compact")
    assert done.max_lora_rank == 8 and "vLLM: --max-lora-rank 8" in done.text()
    with pytest.raises(rw.InputError, match="is there already"):
        rw.export_adapter(mixed, tmp_path / "out", to)
    rw.export_adapter(mixed, tmp_path / "out", to, force=True)


def test_every_consumer_of_files_of_peft_has_a_target():
    assert {c.target for c in CONSUMERS} - {"mlx", "hotswap"} <= TARGETS.keys()
    for consumer in CONSUMERS:
        if consumer.target in TARGETS and consumer.target != "diffusers" and "up to" not in consumer.name:
            assert consumer.reads(TARGETS[consumer.target]) == "right"


def test_the_base_model_that_cannot_be_looked_at_is_said(mixed, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    config = json.loads((mixed / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    (copy / "adapter_model.safetensors").write_bytes((mixed / "adapter_model.safetensors").read_bytes())
    done = rw.export_adapter(copy, tmp_path / "out")
    assert "its base model could not be looked at" in done.text() and len(stored(tmp_path / "out").tensors.shape) == 8


def on(base, folder, *targets):
    """An adapter of rank 8 on some layers of a model that is saved too."""
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    config = LoraConfig(r=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = stirred(get_peft_model(base, config))
    model.save_pretrained(folder / "a", save_embedding_layers=False)
    return folder / "a"


STACKS = {"q_proj": {"v_proj"}, "k_proj": {"q_proj", "v_proj"}, "v_proj": {"q_proj"}, "up_proj": {"gate_proj"}}


@pytest.mark.parametrize("target", [*STACKS, "gate_proj"])
def test_what_sglang_stacks_is_there_or_is_refused(target, tmp_path):
    """It loads no v_proj without q_proj, no q_proj without v_proj, and no up_proj without gate_proj."""
    adapter = on(models.llama(models.write_llama(tmp_path / "base")), tmp_path, target)
    done = rw.export_adapter(adapter, tmp_path / "portable")
    assert done.not_served.get("SGLang") == ("refused" if target in STACKS else None)
    done = rw.export_adapter(adapter, tmp_path / "sglang", "sglang", verify=True)
    assert "SGLang" not in done.not_served and max(done.verified.layers.values()) < 1e-6
    written = json.loads((tmp_path / "sglang" / "adapter_config.json").read_text())["target_modules"]
    assert {*written} == {target} | STACKS.get(target, set())
    (tmp_path / "base" / "config.json").unlink()
    if target not in STACKS:
        rw.export_adapter(adapter, tmp_path / "sglang", "sglang", force=True)
        return
    before = (tmp_path / "sglang" / "adapter_model.safetensors").read_bytes()
    refused = (
        rf"SGLang needs \w+_proj next to .*\.{target}; export can add it as zeros, but its base model could not be"
    )
    with pytest.raises(rw.InputError, match=refused):
        rw.export_adapter(adapter, tmp_path / "sglang", "sglang", force=True)
    assert (tmp_path / "sglang" / "adapter_model.safetensors").read_bytes() == before


SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def without_gates():
    return transformers.NemotronForCausalLM(transformers.NemotronConfig(**SMALL, **HEADS, num_hidden_layers=2))


def without_layers_in_names():
    kinds = {"attention_types": [[["global", "local"], 1]]}
    return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**SMALL, **kinds, num_layers=2, num_heads=2))


def with_two_towers():
    text = {**SMALL, **HEADS, "num_hidden_layers": 2, "head_dim": 8}
    image = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config={**image, "image_size": 28, "patch_size": 14})
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("base", "targets", "refused", "how"),
    [
        (
            without_gates,
            ["up_proj"],
            "SGLang needs gate_proj next to .*up_proj, which its base model does not",
            "refused",
        ),
        (
            without_layers_in_names,
            ["q_proj", "v_proj"],
            r"SGLang ignores transformer\.h\.0\..*q_proj, whose name",
            "wrong",
        ),
        (with_two_towers, ["q_proj", "v_proj"], r"SGLang takes .* and .*\.0\..*q_proj for one layer", "wrong"),
    ],
)
def test_layers_that_sglang_cannot_have_are_refused_for_it(base, targets, refused, how, tmp_path):
    torch.manual_seed(0)
    adapter = on(base(), tmp_path, *targets)
    with pytest.raises(rw.InputError, match=refused):
        rw.export_adapter(adapter, tmp_path / "sglang", "sglang")
    assert not (tmp_path / "sglang").exists()
    assert rw.export_adapter(adapter, tmp_path / "portable").not_served["SGLang"] == how


@pytest.mark.parametrize(
    ("layers", "how"),
    [
        (["model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts.1.down_proj"], None),
        (["model.layers.0.mlp.down_proj", "model.layers.0.mlp.shared_expert.down_proj"], "wrong"),
        (["encoder.embed_tokens", "decoder.embed_tokens"], "wrong"),
        (["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"], "refused"),
        (["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head"], None),
    ],
)
def test_sglang_knows_a_layer_by_its_block_and_last_part(layers, how):
    fault = sglang_fault(layers, [])
    assert (fault and fault[0]) == how


def test_what_export_refuses_is_not_promised(tmp_path):
    """TGI and LoRAX read no head, so there is no form for them of an adapter with one."""
    model = models.adapted(rank=4)
    rw.save(model, tmp_path / "plain")
    assert "TGI and LoRAX: rankwise export writes it" in reading(stored(tmp_path / "plain"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    base = models.llama(models.write_llama(tmp_path / "base"))
    get_peft_model(base, config).save_pretrained(tmp_path / "head", save_embedding_layers=False)
    assert reading(stored(tmp_path / "head")) == ""
    with pytest.raises(rw.InputError, match=r"has base_model\.model\.lm_head\.weight besides A and B"):
        rw.export_adapter(tmp_path / "head", tmp_path / "out", "tgi")


def test_an_adapter_of_one_rank_on_all_layers_of_a_name_is_read_by_more(tmp_path):
    model = models.adapted(rank=8)
    rw.save(model, tmp_path / "a")
    assert "vLLM up to 0.31" not in rw.export_adapter(tmp_path / "a", tmp_path / "b", "peft").text()
    rw.resize(model, dict.fromkeys(ranks(model), 4))
    rw.save(model, tmp_path / "c")
    text = rw.export_adapter(tmp_path / "c", tmp_path / "d", "peft").text()
    assert "TGI and LoRAX" in text and "vLLM up to 0.31" not in text


def test_diffusers_gets_one_file_of_one_rank_without_alphas(tmp_path):
    class Transformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            block = {"to_q": torch.nn.Linear(4, 4), "proj": torch.nn.Conv2d(4, 4, 3)}
            self.transformer_blocks = torch.nn.ModuleList([torch.nn.ModuleDict(block)])

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "proj"], rank_pattern={"to_q": 3}, use_rslora=True)
    stirred(get_peft_model(Transformer(), config)).save_pretrained(tmp_path / "a")
    with pytest.raises(rw.InputError, match=r"give a name that ends in .safetensors"):
        rw.export_adapter(tmp_path / "a", tmp_path / "out", "diffusers")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for kind, prefix in (
        ("FluxTransformer2DModel", "transformer"),
        ("UNet2DConditionModel", "unet"),
        (None, "transformer"),
    ):
        config["auto_mapping"] = {"base_model_class": kind} if kind else None
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        done = rw.export_adapter(tmp_path / "a", tmp_path / "b.safetensors", "diffusers", verify=True, force=True)
        assert max(done.verified.layers.values()) < 1e-6 and done.verified.logits is None
        found, like = load_file(tmp_path / "b.safetensors"), stored(tmp_path / "a")
        assert len(found) == 4 and {key.partition(".")[0] for key in found} == {prefix}
        for name in like.names:  # scale 1, which is what it means without alpha
            A, B = (found[f"{prefix}.{name}.lora_{part}.weight"] for part in "AB")
            assert len(A) == 3 and torch.allclose(B.flatten(1) @ A.flatten(1), delta(like, name), atol=1e-6)
    config["auto_mapping"] = {"base_model_class": "LlamaModel"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(rw.InputError, match="adapts LlamaModel that is no model of diffusers' pipelines"):
        rw.export_adapter(tmp_path / "a", tmp_path / "c.safetensors", "diffusers")


def test_a_file_of_kohyas_gets_one_rank_and_goes_to_no_language_model(tmp_path):
    A, B = torch.randn(2, 2, 4), torch.randn(2, 4, 2)
    tensors = {
        **{f"lora_unet_{n}.lora_down.weight": A[n] for n in range(2)},
        **{f"lora_unet_{n}.lora_up.weight": B[n] for n in range(2)},
        **{f"lora_unet_{n}.alpha": torch.tensor(1.0 + n) for n in range(2)},
        "lora_unet_2.lora_down.weight": torch.ones(3, 4),
        "lora_unet_2.lora_up.weight": torch.ones(4, 3),
        "lora_unet_2.alpha": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    for to in ("portable", "diffusers"):
        done = rw.export_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to, verify=True, force=True)
        found = load_file(tmp_path / "b.safetensors")
        assert {*done.ranks.values()} == {3} and len({float(found[f"lora_unet_{n}.alpha"]) for n in range(3)}) == 1
        for n in range(2):
            assert torch.allclose(
                delta(stored(tmp_path / "b.safetensors"), f"lora_unet_{n}"), (1 + n) / 2 * B[n] @ A[n]
            )
    for to in ("vllm", "peft", "llama.cpp"):
        with pytest.raises(rw.InputError, match="diffusion pipelines, which"):
            rw.export_adapter(tmp_path / "a.safetensors", tmp_path / "c.safetensors", to)
    with pytest.raises(rw.InputError, match="'lorax' is not known: give one of portable, vllm"):
        rw.export_adapter(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "lorax")


MORE = {
    "a magnitude": ({"use_dora": True}, "lora_magnitude_vector", ()),
    "another head": ({"modules_to_save": ["lm_head"]}, "lm_head.weight", ()),
    "two heads": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head.weight", ()),
    "a classifier": ({"modules_to_save": ["score"], "task_type": "SEQ_CLS"}, "score.weight", ("vllm",)),
    "a copy of the base": (
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        None,
        ("vllm", "sglang", "tgi", "llama.cpp"),
    ),
}


@pytest.mark.parametrize(("options", "named", "read"), MORE.values(), ids=MORE)
def test_what_a_program_does_not_read_is_refused_for_it(options, named, read, tmp_path):
    kind = transformers.LlamaForSequenceClassification if "SEQ" in options.get("task_type", "") else None
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    base = (kind or transformers.LlamaForCausalLM)(config)
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=named is None)
    for to in ("vllm", "sglang", "tgi", "llama.cpp"):
        if to in read:
            rw.export_adapter(tmp_path / "a", tmp_path / to, to)
            continue
        with pytest.raises(
            rw.InputError, match=f"has base_model.model..*{named}.* which {to} does not read: rankwise merge"
        ):
            rw.export_adapter(tmp_path / "a", tmp_path / to, to)
    others = stored(tmp_path / "a").others
    notes = rw.export_adapter(tmp_path / "a", tmp_path / "portable").notes
    rest = f" and {len(others) - 1} more" if len(others) > 1 else ""
    assert not others or f"besides its layers it has {others[0]}{rest}, which PEFT reads" in notes


def test_a_wrong_adapter_is_found(mixed, tmp_path):
    rw.export_adapter(mixed, tmp_path / "a", "peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name] * 1.001}, file)
    with pytest.raises(rw.InputError, match=r"ΔW of .*_proj differs by 1.0e-03 of itself"):
        verified(stored(mixed), stored(tmp_path / "a"), logits=False)
    rw.export_adapter(mixed, tmp_path / "b", "portable")
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    empty = next(name for name, value in tensors.items() if "lora_B" in name and not value.any())
    save_file({**tensors, empty: tensors[empty] + 1}, file)
    with pytest.raises(rw.InputError, match="which .* does not"):
        verified(stored(mixed), stored(tmp_path / "b"), logits=False)


@pytest.mark.large
def test_outputs_are_compared_in_stock_peft(mixed, tmp_path):
    done = CliRunner().invoke(app, ["export", str(mixed), "-o", str(tmp_path / "out"), "--verify", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["verified"]
    assert found["logits"][0] < 1e-5 < found["logits"][1] and not found["why"]
    config = json.loads((mixed / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(tmp_path / "gone")
    }
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes((mixed / "adapter_model.safetensors").read_bytes())
    text = rw.export_adapter(tmp_path / "out", tmp_path / "again", "peft", verify=True).text()
    assert "outputs were not compared: " in text and "gone" in text


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as takes a new repository with files in it."""

    files: dict[str, bytes] = {}
    refused = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refused or self.headers["Authorization"] != "Bearer hf_token":
            return self.answer({"error": "no such rights"}, 403)
        if self.path == "/api/repos/create":
            name = json.loads(body)
            return self.answer({"url": f"http://{self.headers['Host']}/someone/{name['name']}"})
        if self.path.endswith("/preupload/main"):
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.files.pop(line["value"]["oid"])
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"http://{self.headers['Host']}/someone/it/commit/1", "commitOid": "1"})
        if self.path.endswith("/objects/batch"):
            sent = [
                {**each, "actions": {"upload": {"href": f"http://{self.headers['Host']}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"objects": sent, "transfer": "basic"})
        return self.answer({}, 200)

    def do_PUT(self):
        self.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        self.answer({"id": "someone/it", "sha": "1", "siblings": []})

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub on this machine."""
    from huggingface_hub import constants, hf_api

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hf_api, "ENDPOINT", address, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    yield address
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's, of httpx
def test_what_is_written_goes_to_the_hub(hub, mixed, tmp_path):
    Hub.files = {}
    done = rw.export_adapter(mixed, tmp_path / "out", push="someone/it")
    assert f"on the hub: {hub}/someone/it" in done.text()
    assert Hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert all(Hub.files[path.name] == path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_hub_that_refuses_is_one_line_and_leaves_the_files(hub, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "refused", True)
    with pytest.raises(rw.InputError, match="someone/it: the hub refuses it, but .*out is written") as caught:
        rw.export_adapter(mixed, tmp_path / "out", push="someone/it")
    assert "\n" not in str(caught.value) and stored(tmp_path / "out").names
