"""A vision transformer that knows the digits 0 to 4 learns 5 to 9 with an adapter whose ranks move."""

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, set_seed

import rankwise as rw

set_seed(0)
digits = load_digits()  # 1,797 images of 8 x 8, in scikit-learn
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (n, 1, 8, 8)
labels = torch.tensor(digits.target)


def rows(low, high):
    """Training and held-out images of some digits."""
    chosen = ((labels >= low) & (labels < high)).nonzero().flatten()
    return chosen[: -len(chosen) // 4], chosen[-len(chosen) // 4 :]


def train(model, optimizer, chosen, low, steps):
    model.train()
    for _ in range(steps):
        batch = chosen[torch.randint(len(chosen), (64,))]
        model(images[batch], labels=labels[batch] - low).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model, chosen, low):
    model.eval()
    return (model(images[chosen]).logits.argmax(-1) == labels[chosen] - low).float().mean().item()


config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_labels=5, hidden_dropout_prob=0.0,
)  # fmt: skip
model = ViTForImageClassification(
    config
)  # yours: ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
known, held_out = rows(0, 5)
train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), known, 0, steps=200)
print(f"digits 0 to 4, all {sum(p.numel() for p in model.parameters()):,} weights: {accuracy(model, held_out, 0):.3f}")

new, held_out = rows(5, 10)
print(f"digits 5 to 9, before: {accuracy(model, held_out, 5):.3f}")
method = rw.SimplexLoRA(rank=4, targets=["q_proj", "v_proj", "fc1", "fc2"], every=20, times=3)
model = method.attach(model, head=["classifier"])
train(model, rw.SimplexAdam(method, model, lr=3e-3), new, 5, steps=100)
print(f"after, {rw.rank_report(model).total:,} adapter parameters: {accuracy(model, held_out, 5):.3f}")
print(rw.rank_report(model))
rw.save(model, "adapter")
