import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import models
from rankwise.errors import InputError
from rankwise.nets.blocks import outputs, stacks

BERT = {"attention.output.dense", "output.dense"}
LLAMA = {"self_attn.o_proj", "mlp.down_proj"}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 1}
# Model class, its configuration, and the projections of a block by their names in it (or of both kinds of blocks).
FORMS = {
    "bert": ("BertModel", {**SMALL}, BERT),
    "bert decoder": (
        "BertModel",
        {**SMALL, "is_decoder": True, "add_cross_attention": True},
        {*BERT, "crossattention.output.dense"},
    ),
    "roberta": ("RobertaModel", {**SMALL}, BERT),
    "electra": ("ElectraModel", {**SMALL, "embedding_size": 8}, BERT),
    "deberta-v2": ("DebertaV2Model", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, BERT),
    "distilbert": (
        "DistilBertModel", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}, {"attention.out_lin", "ffn.lin2"}
    ),
    "modernbert": ("ModernBertModel", {**SMALL, "pad_token_id": 0}, {"attn.Wo", "mlp.Wo"}),
    "gpt2": ("GPT2Model", {"n_embd": 16, "n_layer": 2, "n_head": 2}, {"attn.c_proj", "mlp.c_proj"}),
    "gpt2 with an inner width of its own": (
        "GPT2Model", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 16}, {"attn.c_proj", "mlp.c_proj"},
    ),
    "gpt-neox": ("GPTNeoXModel", {**SMALL}, {"attention.dense", "mlp.dense_4h_to_h"}),
    "opt": (
        "OPTModel",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 40, "word_embed_proj_dim": 16},
        {"self_attn.out_proj", "fc2"},
    ),
    "llama": ("LlamaModel", {**GROUPED}, LLAMA),
    "llama with wide heads": ("LlamaModel", {**GROUPED, "head_dim": 16}, LLAMA),
    "mistral": ("MistralModel", {**GROUPED}, LLAMA),
    "qwen2": ("Qwen2Model", {**GROUPED}, LLAMA),
    "qwen3": ("Qwen3Model", {**GROUPED, "head_dim": 8}, LLAMA),
    "gemma2": ("Gemma2Model", {**GROUPED, "head_dim": 8}, LLAMA),
    "phi3": ("Phi3Model", {**GROUPED, "pad_token_id": 0}, LLAMA),
    "t5": (
        "T5Model",
        {"d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
        {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"},
    ),
    "t5 with a gate": (
        "T5Model",
        {"d_model": 16, "d_kv": 4, "d_ff": 40, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"},
        {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"},
    ),
    "bart": (
        "BartModel",
        {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
        {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"},
    ),
}  # fmt: skip


def made(kind, options):
    kind = getattr(transformers, kind)
    with torch.device("meta"):
        return kind(kind.config_class(**options))


@pytest.mark.parametrize("form", FORMS)
def test_the_projections_that_write_to_the_residual_stream_are_found_by_form(form):
    kind, options, expected = FORMS[form]
    model = made(kind, options)
    names = {module: name for name, module in model.named_modules()}
    found = [[names[part] for part in (*block.attention, block.feed_forward)] for block in outputs(model)]
    assert len(found) == sum(len(stack) for stack in stacks(model))
    ends = {re.sub(r"^.*?\.\d+\.(layer\.\d+\.)?", "", name) for block in found for name in block}
    assert ends == expected
    assert all(len(set(block)) == len(block) >= 2 for block in found)
    flat = [name for block in found for name in block]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("shape", models.SHAPES)
def test_all_that_a_block_adds_goes_through_what_was_found(shape):
    model = models.model(shape)
    names = {part: name for name, part in model.named_modules()}
    ends = [names[part] for block in outputs(model) for part in (*block.attention, block.feed_forward)]

    @torch.no_grad()
    def logits(silent, seed):
        """Logits with the layers in `silent` at 0 and all other linear layers of the blocks drawn anew."""
        twin = copy.deepcopy(model)
        inside = {part for stack in stacks(twin) for part in stack.modules() if isinstance(part, (nn.Linear, Conv1D))}
        torch.manual_seed(seed)
        for name, part in twin.named_modules():
            if part in inside:
                for p in part.parameters():
                    p.zero_() if name in silent else p.normal_(std=0.5)
        return models.logits(twin)

    assert torch.equal(logits(ends, 1), logits(ends, 2))
    last = [names[part] for part in stacks(model)[-1].modules() if names[part] in ends]
    for end in last:  # an encoder is only heard through the decoder
        rest = [other for other in ends if other != end]
        assert not torch.equal(logits(rest, 1), logits(rest, 2))


def test_encoder_and_decoder_are_two_stacks_in_this_order():
    model = models.model("t5")
    assert stacks(model) == [model.transformer.encoder.block, model.transformer.decoder.block]
    cross = [len(block.attention) for block in outputs(model)]
    assert cross == [1, 2]


def test_lists_without_attention_are_no_stacks():
    model = models.model()
    model.more_heads = nn.ModuleList([nn.Linear(16, 2), nn.Linear(16, 2)])
    assert stacks(model) == [model.bert.encoder.layer]
    with pytest.raises(InputError, match="no list of blocks with attention"):
        stacks(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])))


class Attention(nn.Module):
    """Its output projection is not its last layer."""

    def __init__(self):
        super().__init__()
        self.o_proj, self.gate_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.q_proj, self.k_proj, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self, *feed_forward, attention=Attention):
        super().__init__()
        self.attention = attention()
        self.feed_forward = nn.Sequential(*feed_forward)


def blocks(*feed_forward, **kwargs):
    return nn.Sequential(nn.ModuleList([Block(*feed_forward, **kwargs)]))


def test_queries_keys_values_and_gates_are_no_end_wherever_they_stand():
    model = blocks(nn.Linear(4, 4), nn.Linear(4, 4))
    assert outputs(model) == [([model[0][0].attention.o_proj], model[0][0].feed_forward[1])]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: made("MixtralModel", {**GROUPED, "num_local_experts": 2}), "mixture of experts"),
        (
            lambda: made("XLNetModel", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 40}),
            "no linear layer as output projection",
        ),
        (lambda: made("MobileBertModel", {"num_hidden_layers": 2}), "unknown block"),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False), "fused"),
        (lambda: blocks(), "unknown block"),
        (lambda: blocks(nn.Linear(4, 4)), "unknown block"),
        (lambda: blocks(nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 9), nn.Linear(9, 4)), "unknown block"),
        (lambda: blocks(nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(9, 4)), "unknown block"),
        (lambda: blocks(nn.Linear(8, 9), nn.Linear(9, 4)), "unknown block"),
    ],
)
def test_a_block_of_another_form_is_refused_in_one_line(model, message):
    with pytest.raises(InputError, match=message) as caught:
        outputs(model())
    assert "\n" not in str(caught.value)
