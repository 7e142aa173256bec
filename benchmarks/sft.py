"""The same training by rankwise and by TRL's SFTTrainer: tokens a second, memory, losses.

`benchmarks/suite.py` runs it as the part sft. SmolLM2-135M learns to answer with the first line of a function; each
training is a process of its own, and they take turns. TRL gets the rows in the order in which rankwise took them.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, STEPS, ROWS, LONGEST, RANK, RATE = "smollm2", 6, 8, 128, 8, 1e-3
OURS: dict[str, dict[str, Any]] = {
    "rankwise, `fast: false`": {"fast": False},
    "rankwise, `fast: true`": {"fast": True},
    "rankwise, `fast: true`, `activation_memory: lean`": {"fast": True, "activation_memory": "lean"},
}
TRL = "TRL"


def sft(tokens: int, rounds: int, model: str = MODEL) -> dict[str, Any]:
    """A row for each program, with what a step takes over TRL's in the same round."""
    from measures import over, quartiles
    from parts import result

    rounds = max(2, rounds // 7)
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, TRL)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, STEPS * ROWS)
        for _ in range(rounds):
            for each in done:  # ours first, whose order of rows TRL takes
                command = [sys.executable, __file__, str(folder), each, "--model", model]
                shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                done[each].append(json.loads(shown.splitlines()[-1]))
    rows = [
        {
            "program": each,
            "over TRL": over([run["seconds"] for run in runs], [run["seconds"] for run in done[TRL]]),
            "tokens a second": quartiles([run["tokens"] / run["seconds"] for run in runs]),
            "peak": statistics.median(run["peak"] for run in runs),
            "losses": runs[0]["losses"],
        }
        for each, runs in done.items()
    ]
    return result(rows, rounds=rounds, model=model, trl=done[TRL][0]["version"])


def write_rows(folder: Path, count: int) -> None:
    """Questions and answers of the task about Python's own functions, to train on and to evaluate on."""
    import rankwise as rw

    data = rw.task("stdlib-signature").train().data["conversation"]
    for name, chosen in (("train", range(count)), ("validation", range(count, count + 2))):
        turns = [[turn["content"] for turn in json.loads(data[place])[0]] for place in chosen]
        rows = [{"prompt": asked, "completion": answer} for asked, answer in turns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Noted:
    """Times of the steps, and the peak of memory, of any training by transformers' Trainer."""

    def __init__(self) -> None:
        import torch
        from arms import peak
        from transformers import trainer_callback

        self.clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        self.ends: list[float] = []
        self.losses: list[float] = []
        handler, noted = trainer_callback.CallbackHandler, self
        begun, ended, logged = handler.on_train_begin, handler.on_step_end, handler.on_log
        memory = peak()

        def on_train_begin(*given: Any, **named: Any) -> Any:
            noted.grown = memory.__enter__()
            return begun(*given, **named)

        def on_step_end(*given: Any, **named: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            noted.ends.append(noted.clock())
            if len(noted.ends) == STEPS:
                memory.__exit__(None, None, None)
            return ended(*given, **named)

        def on_log(handler: Any, args: Any, state: Any, control: Any, logs: dict[str, float], **named: Any) -> Any:
            noted.losses += [logs["loss"]] if "loss" in logs else []
            return logged(handler, args, state, control, logs, **named)

        handler.on_train_begin, handler.on_step_end, handler.on_log = on_train_begin, on_step_end, on_log

    def result(self, tokens: list[int]) -> dict[str, Any]:
        """Without the first step, which is slower."""
        [peak] = self.grown
        seconds = self.ends[-1] - self.ends[0]
        return {"seconds": seconds, "tokens": sum(tokens[1:]), "peak": peak, "losses": self.losses}


def ours(folder: Path, model: str, more: dict[str, Any]) -> dict[str, Any]:
    import rankwise as rw
    from rankwise.train.trainer import RunTrainer

    steps: list[list[int]] = []
    tokens: list[int] = []
    pieces = RunTrainer._pieces

    def noted(trainer: RunTrainer, rows: Any) -> Any:
        steps.append([row["idx"] for row in rows])
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return pieces(trainer, rows)

    RunTrainer._pieces = noted
    times = Noted()
    task = {"type": "instruct", "dataset": str(folder)}
    method = {"name": "lora", "rank": RANK, "alpha": 16.0}
    usual = {"learning_rate": RATE, "seed": 0, "max_length": LONGEST, "max_steps": STEPS, "batch_size": ROWS}
    settings = {"task": task, "model": model, "method": method, **usual, "eval_every": 0, "eval_rows": 2, **more}
    with tempfile.TemporaryDirectory() as runs:
        rw.train(settings, runs=runs)
    (folder / "order.json").write_text(json.dumps([steps[:STEPS], tokens[:STEPS]]))
    return times.result(tokens[:STEPS])


def theirs(folder: Path, model: str) -> dict[str, Any]:
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from rankwise.train import gguf

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    steps, tokens = json.loads((folder / "order.json").read_text())
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    said = {"prompt": "user", "completion": "assistant"}
    rows = [{key: [{"role": role, "content": line[key]}] for key, role in said.items()} for line in lines]
    times = Noted()
    path = gguf.folder_of(model) if gguf.is_gguf(model) else model
    args = trl.SFTConfig(
        str(folder / "trl"), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0.06, seed=0,
        max_length=LONGEST, per_device_train_batch_size=ROWS, max_grad_norm=1.0, logging_steps=1, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    set_seed(0)
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list([rows[row] for each in steps for row in each]),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return {**times.result(tokens), "version": trl.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the rows")
    parser.add_argument("program", choices=[*OURS, TRL])
    parser.add_argument("--model", default=MODEL)
    asked = parser.parse_args()
    random.seed(0)
    ran = (
        theirs(asked.folder, asked.model)
        if asked.program == TRL
        else ours(asked.folder, asked.model, OURS[asked.program])
    )
    print(json.dumps(ran))


if __name__ == "__main__":
    main()
