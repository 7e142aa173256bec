"""TRL's SFTTrainer teaches SmolLM2-135M a style of answer, while RankCallback's method moves the ranks."""

import json

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import rankwise as rw
from rankwise.train.gguf import folder_of

set_seed(0)
base = str(folder_of("smollm2"))  # SmolLM2-135M-Instruct, from its Python package; or the name of a model on the hub
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
conversations = rw.task("stdlib-signature").train().data["conversation"][:24]  # what a function does, its first line
rows = Dataset.from_list([{"messages": json.loads(each)[0]} for each in conversations])

method = rw.SimplexLoRA(rank=4, targets=["q_proj", "v_proj"], every=3, times=2)
model = method.attach(model)
args = SFTConfig(
    "out", max_steps=12, per_device_train_batch_size=2, learning_rate=2e-3, max_length=96, logging_steps=3,
    save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
)  # fmt: skip
trainer = SFTTrainer(
    model,
    args,
    train_dataset=rows,
    processing_class=tokenizer,
    callbacks=[rw.RankCallback(method)],
    optimizers=(method.optimizer(model, args), None),
)
trainer.train()

print(f"{rw.rank_report(model).total:,} adapter parameters; ranks {sorted({site.rank for site in rw.sites(model)})}")
rw.save(model, "adapter")

chat = AutoPeftModelForCausalLM.from_pretrained("adapter")  # plain PEFT
question = [
    {"role": "user", "content": "Write the first line of a Python function. Return the current time in seconds."}
]
tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = chat.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
print("answer:", tokenizer.decode(answer, skip_special_tokens=True))
