"""TRL's own trainers, with RankCallback in them."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import methods
import rankwise as rw
from rankwise.ranks import ranks

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")
pytestmark = [pytest.mark.large, pytest.mark.filterwarnings("ignore")]  # the warnings are theirs
STEPS = 6
TEXTS = {
    "DPOTrainer": [{"prompt": "a b", "chosen": f" {x} d", "rejected": f" {x} e"} for x in "abcdefgh"],
    "KTOTrainer": [{"prompt": "a b", "completion": f" {x} d", "label": x < "e"} for x in "abcdefgh"],
    "SFTTrainer": [{"text": "a b c d e f"}] * 60,
}
# Those that copy the adapter, parameter by parameter, into a reference
REFERRING = [
    name for name in dir(trl) if name.endswith("Trainer") and '".default."' in inspect.getsource(getattr(trl, name))
]


def words():
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<end>", "<none>", *"abcdefghij"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>", unk_token="<none>")


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


def made(name, method, folder, reference=None, **more):
    torch.manual_seed(1)
    model = method.attach(base())
    texts = TEXTS.get(name, [{"prompt": "a b"}] * 8)
    given = {"ref_model": reference} if reference is not None else {}
    if name not in TEXTS:  # those that let the model write
        given["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
        more = {"num_generations": 2, "max_completion_length": 4, **more}
    if name in REFERRING:
        more = {"beta": 0.1, **more}
    args = getattr(trl, name.replace("Trainer", "Config"))(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, seed=3, save_steps=2,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, gradient_checkpointing=False,
        dataloader_pin_memory=False, **{"bf16": False, **more},
    )  # fmt: skip
    return getattr(trl, name)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(texts),
        processing_class=words(),
        callbacks=[rw.RankCallback(method)],
        optimizers=(method.optimizer(model, args), None),
        **given,
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def logits(model):
    return model.eval()(torch.tensor([[3, 4, 5, 6]])).logits


def test_trainers_that_copy_an_adapter_by_the_names_of_its_parameters_are_known():
    assert {"DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"} <= set(REFERRING)


@pytest.mark.parametrize("name", REFERRING)
def test_the_reference_of_a_search_is_where_it_began(name, tmp_path):
    method = rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=200.0)
    trainer = made(name, method, tmp_path, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == STEPS and ranks(trainer.model)
    trainer.model.set_adapter("ref")
    assert torch.allclose(logits(trainer.model), logits(base()), atol=1e-6)


@pytest.mark.parametrize("kind", ["simplex-lora", "sora", "pissa"])
def test_dpo_does_the_same_with_a_reference_of_its_own_and_resumes(kind, tmp_path):
    method = methods.method(kind)
    whole = made("DPOTrainer", method, tmp_path)
    whole.train()
    alone = made("DPOTrainer", method, tmp_path / "alone", base(), save_strategy="no")
    alone.train()
    assert losses(whole) == pytest.approx(losses(alone), abs=1e-5)
    again = made("DPOTrainer", method, tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    with pytest.raises(ValueError, match="not a finished adapter") if kind != "pissa" else nullcontext():
        PeftModel.from_pretrained(base(), tmp_path / "checkpoint-2")
    rw.save(whole.model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(whole.model), atol=1e-5)


def test_a_method_that_peft_lets_stand_alone_takes_a_reference_of_its_own(tmp_path):
    method = methods.method("adalora")
    with pytest.raises(rw.InputError, match="pass ref_model="):
        made("DPOTrainer", method, tmp_path)
    trainer = made("DPOTrainer", method, tmp_path, base(), save_strategy="no")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_sft_with_packed_texts_resumes(bf16, tmp_path):
    method = rw.SimplexLoRA(rank=2, every=2, times=2, omega_rate=200.0)
    more = {"packing": True, "max_length": 16, "bf16": bf16, "gradient_accumulation_steps": 2}
    whole = made("SFTTrainer", method, tmp_path, **more)
    whole.train()
    again = made("SFTTrainer", method, tmp_path / "again", **more)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole) and losses(whole)[-1] < losses(whole)[0]
    assert ranks(again.model) == ranks(whole.model) and len(set(ranks(whole.model).values())) > 1
