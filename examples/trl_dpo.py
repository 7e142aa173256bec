"""TRL's DPOTrainer: SmolLM2-135M learns to prefer the first line of a function to a sentence about it."""

import json

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import rankwise as rw
from rankwise.train.gguf import folder_of

set_seed(0)
base = str(folder_of("smollm2"))
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
conversations = rw.task("stdlib-signature").train().data["conversation"][:16]  # what a function does, its first line
pairs = [
    {
        "prompt": [question],
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": "Here is a function that does this:"}],
    }
    for question, answer in (json.loads(each)[0] for each in conversations)
]

method = rw.WeightLoRA(rank=4, targets=["q_proj", "v_proj"], keep=40, start=2, every=5)
model = method.attach(model)
args = DPOConfig(
    "out", max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3, beta=0.1, max_length=80, logging_steps=4,
    save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
)  # fmt: skip
trainer = DPOTrainer(  # its reference is a copy of the adapter as it starts, without rank changes
    model,
    args=args,
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    callbacks=[rw.RankCallback(method)],
    optimizers=(method.optimizer(model, args), None),
)
trainer.train()

margins = [line["rewards/margins"] for line in trainer.state.log_history if "loss" in line]
print("chosen over rejected:", *(f"{margin:+.3f}" for margin in margins))
print(
    f"{rw.rank_report(model).total:,} adapter parameters in {sum(site.present for site in rw.sites(model))} of 60 sites"
)
model.set_adapter("default")
rw.save(model, "adapter")
