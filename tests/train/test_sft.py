"""The losses of a run are those of TRL's SFTTrainer on the same file, step by step."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import rankwise as rw
from rankwise.tasks.generation import IGNORE
from rankwise.train import gguf
from rankwise.train.trainer import RunTrainer
from runs import lines

trl = pytest.importorskip("trl", minversion="1.16", reason="no TRL with these templates: pip install -e '.[dev]'")
pytestmark = [pytest.mark.large, pytest.mark.filterwarnings("ignore")]  # the warnings are theirs
STEPS, LONGEST = 5, 160
TEMPLATES = Path(str(trl.__file__)).parent / "chat_templates"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, and SmolLM2's tokenizer with a template of which TRL knows the answers."""
    folder = tmp_path_factory.mktemp("base")
    file = gguf._embedded()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = (TEMPLATES / "qwen3_instruct_2507.jinja").read_text()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one to three questions, of very different lengths."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = [word for word in (TEMPLATES / "README.md").read_text().split() if word.isalpha()]
    text = lambda most: " ".join(draw.choices(words, k=draw.randint(1, most)))  # noqa: E731
    for name, count in (("train", 12), ("validation", 2)):
        rows = [
            {"messages": [
                {"role": role, "content": text(most)}
                for _ in range(draw.randint(1, 3))
                for role, most in (("user", 6), ("assistant", 12))
            ]}
            for _ in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class InOrder(trl.SFTTrainer):
    """It takes the rows in their order."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def ours(folder: Path, base: Path, data: Path, kind: str = "chat", **more: Any) -> tuple[list[float], list[list[int]]]:
    """The losses of a run, and the rows of each step."""
    steps: list[list[int]] = []
    pieces = RunTrainer._pieces

    def noted(trainer: RunTrainer, rows: Any) -> Any:
        steps.append([row["idx"] for row in rows])
        return pieces(trainer, rows)

    task = {"type": kind, "dataset": str(data)}
    method = {"name": "lora", "rank": 4, "alpha": 8.0}
    usual = {"learning_rate": 2e-2, "seed": 3, "max_length": LONGEST, "max_steps": STEPS, "eval_every": 0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunTrainer, "_pieces", noted)
        trained = rw.train({"task": task, "model": str(base), "method": method, **usual, **more}, runs=folder)
    return [line["loss"] for line in lines(trained.folder / "metrics.jsonl") if "loss" in line], steps[:STEPS]


def rows_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]


def theirs(folder: Path, base: Path, rows: list[dict[str, Any]], **more: Any) -> list[float]:
    """The losses of SFTTrainer with a stock LoraConfig on these rows, in their order."""
    args = trl.SFTConfig(
        str(folder), max_steps=STEPS, learning_rate=2e-2, lr_scheduler_type="linear", warmup_steps=0.06, seed=3,
        max_length=LONGEST, assistant_only_loss="messages" in rows[0], max_grad_norm=1.0, logging_steps=1, bf16=False,
        use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = InOrder(
        model=LlamaForCausalLM.from_pretrained(base),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert (len(trainer.train_dataset) != len(rows)) == args.packing
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("at_once", [4, 2, 1])
def test_losses_without_packing(at_once: int, base: Path, data: Path, tmp_path: Path) -> None:
    """Under accumulation too: the loss is the mean over all tokens of the step that are learnt."""
    losses, steps = ours(tmp_path / "ours", base, data, batch_size=4, micro_batch=at_once)
    assert len({tuple(rows) for rows in steps}) > 3
    more = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": 4 // at_once}
    file = rows_of(data)
    other = theirs(tmp_path / "theirs", base, [file[row] for rows in steps for row in rows], **more)
    assert other[-1] < other[0] - 0.2
    assert losses == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("at_once", [12, 1])
def test_losses_with_packing(at_once: int, base: Path, data: Path, tmp_path: Path) -> None:
    """A step has all rows, since TRL counts packs, and not rows, in a batch."""
    losses, steps = ours(tmp_path / "ours", base, data, batch_size=12, packing=True, micro_batch=at_once)
    assert [sorted(rows) for rows in steps] == [[*range(12)]] * STEPS
    more = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": 12 // at_once}
    other = theirs(tmp_path / "theirs", base, rows_of(data), packing=True, **more)
    assert other[-1] < other[0] - 0.2
    assert losses == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("kind", ["instruct", "text"])
def test_losses_of_instructions_and_of_texts_in_blocks(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    """TRL makes the blocks of texts when it packs without regard to where one ends ("wrapped")."""
    for file in data.glob("*.jsonl"):
        pairs = [row["messages"][:2] for row in map(json.loads, file.read_text().splitlines())]
        rows = [{"prompt": asked["content"], "completion": answer["content"]} for asked, answer in pairs]
        if kind == "text":
            rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows]
        (tmp_path / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses, _ = ours(tmp_path / "ours", base, tmp_path, kind, batch_size=12)
    more: dict[str, Any] = {"packing": True, "packing_strategy": "wrapped"} if kind == "text" else {}
    judged = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        if kind == "instruct"
        else row
        for row in rows_of(tmp_path)
    ]
    other = theirs(tmp_path / "theirs", base, judged, per_device_train_batch_size=12, **more)
    assert other[-1] < other[0] - 0.2
    assert losses == pytest.approx(other, abs=1e-4)


def test_what_is_learnt_of_a_turn(base: Path, data: Path) -> None:
    """TRL's own template for Qwen 2.5 learns a token more of each turn, the line break after `assistant`.

    It is part of the prompt for an answer, so that no model is ever asked for it.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (TEMPLATES / "qwen2_5.jinja").read_text()
    task = rw.task({"type": "chat", "dataset": str(data)})
    for row, file in zip(task.encode(task.train(), tokenizer, 512), rows_of(data), strict=True):
        messages = file["messages"]
        judged = tokenizer.apply_chat_template(
            messages,
            chat_template=trl.chat_template_utils.get_training_chat_template(tokenizer),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learnt = [label != IGNORE for label in row["labels"]]
        more = [place for place, marked in enumerate(judged["assistant_masks"]) if marked and not learnt[place]]
        assert judged["input_ids"] == row["input_ids"] and sum(judged["assistant_masks"]) == sum(learnt) + len(more)
        assert [tokenizer.decode(row["input_ids"][place]) for place in more] == ["\n"] * (len(messages) // 2)
        assert all(learnt[place + 1] for place in more)


def test_the_benchmark_trains_alike_in_both(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import page
    import sft

    lean = [*sft.OURS][-1]
    monkeypatch.setattr(sft, "OURS", {lean: sft.OURS[lean]})
    found = sft.sft(0, 2, model=str(base))
    by_program = {row["program"]: row for row in found["rows"]}
    assert by_program.keys() == {lean, sft.TRL}
    other = by_program[sft.TRL]["losses"]
    for row in found["rows"]:
        assert row["losses"] == pytest.approx(other, abs=1e-4) and len(other) == sft.STEPS
        assert row["peak"] > 0 and row["tokens a second"][0] > 0
    assert page.section("sft", {**found, "rounds": 2, "seconds": 1}).count("\n| ") == 4
