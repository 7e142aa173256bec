"""rankwise without any of its optional dependencies: trains, saves, lets PEFT load that, then runs commands.

    python alone.py 'COMMAND' …

In the current folder, which has a classifier in `whole/`; `adapter/` and `classifier/` are left. Prints a JSON line for
each command: exit code, stdout, stderr.
"""

import contextlib
import io
import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

import rankwise as rw


def train() -> None:
    """A search that moves rank, by transformers' Trainer; what it saves is the same to stock PEFT."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained("base")
    method = rw.SimplexLoRA(rank=2, targets=["q_proj", "v_proj"], every=2, times=2, omega_rate=1000)
    model = method.attach(LlamaForCausalLM.from_pretrained("base"))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (16, 8))]
    args = TrainingArguments("out", max_steps=6, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True)
    rw.RankTrainer(method=method, model=model, args=args, train_dataset=rows).train()
    assert len({site.rank for site in rw.sites(model)}) > 1, rw.rank_report(model)
    rw.save(model, "adapter")
    stock = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter").eval()
    inputs = rows[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.allclose(stock(inputs).logits, model.eval()(inputs).logits, atol=1e-5)


def classify() -> None:
    """An adapter of the classifier in `whole/`, in `classifier/`."""
    whole = AutoModelForSequenceClassification.from_pretrained("whole")
    model = rw.LoRA(rank=2, targets=["query"]).attach(whole, head=["classifier"])
    for site in rw.sites(model):
        torch.nn.init.normal_(site.B)
    rw.save(model, "classifier")


def run(words: list[str]) -> tuple[int, str, str]:
    from rankwise.cli import main

    sys.argv = ["rankwise", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("a command ends with an exit code")


with contextlib.redirect_stdout(sys.stderr):
    train()
    classify()
for command in sys.argv[1:]:
    print(json.dumps(run(command.split())), flush=True)
