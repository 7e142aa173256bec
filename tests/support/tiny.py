"""Small models for the tests. One place, so that every test means the same thing."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankwise.conformance.models import LABELS as LABELS
from rankwise.conformance.models import SHAPES as SHAPES
from rankwise.conformance.models import VOCABULARY as VOCABULARY
from rankwise.conformance.models import batch as batch
from rankwise.conformance.models import head as head
from rankwise.conformance.models import logits as logits
from rankwise.conformance.models import model as model
from rankwise.conformance.models import recompute as recompute
from rankwise.conformance.models import rows as rows
from rankwise.conformance.models import train as train
from rankwise.ranks import sites


def adapted(rank: int = 4, shape: str = "bert") -> PeftModel:
    """A model that PEFT alone has adapted, with a B that is not 0 any more."""
    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["query", "value", "dense"])
    made = get_peft_model(model(shape), config)
    for site in sites(made):
        torch.nn.init.normal_(site.B, std=0.1)
    return made.eval()


class Half(nn.Module):
    """Two linear layers of which the second has no part in the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)
