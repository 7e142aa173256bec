"""The end of a run: it is scored, and its adapter and result are written to its folder."""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from rankwise.adapters import save
from rankwise.adapters.card import CARD, Facts
from rankwise.adapters.save import settle
from rankwise.adapters.stored import padding, stored
from rankwise.errors import InputError, need
from rankwise.files import TOKENIZER, USE, claim, flush, replace_folder, unfinished, write_whole
from rankwise.processes import together
from rankwise.ranks.kept import merged_sites
from rankwise.runs import answers
from rankwise.runs.result import FILE, Benchmark, Cost, Parameters, Result, Splits
from rankwise.runs.result import Split as Rows
from rankwise.runs.search import Search
from rankwise.runs.store import WEIGHTS, clear
from rankwise.runs.use import Use
from rankwise.tasks import Scored, Split, Task
from rankwise.train import model as models
from rankwise.train.chain import keep_weights
from rankwise.train.checkpoint_files import file_digest
from rankwise.train.parts import Parts, all_metrics
from rankwise.train.progress import Progress


def finish(folder: Path, name: str, parts: Parts, progress: Progress, search: Search | None) -> Result:
    """Fold, score and save a trained run, and write its `result.json` last."""
    if search is not None:
        print(f"{parts.method.name}: {search}", file=sys.stderr)
    if parts.config.followed:
        keep_weights(folder, parts.model)
    parts = replace(parts, model=parts.method.fold(parts.model))  # score what is saved
    if isinstance(parts.model, PeftModel) and not merged_sites(parts.model):
        settle(parts.model)
    progress.rank_line(parts.model, parts.plan.steps)
    scored = parts.evaluate(final=True)
    scores = all_metrics(scored)
    progress.evaluation_line(parts.plan.steps, parts.plan.steps / parts.plan.per_epoch, scores)
    _write_predictions(folder, scored)
    counts = [count - parts.head_parameters for count in progress.counts]
    result = Result(
        run=name,
        task=parts.task.label,
        method=parts.method.name,
        options=asdict(parts.method),
        model=models.label(parts.config.model, parts.task),
        seed=parts.config.seed,
        learning_rate=parts.config.learning_rate,
        score=parts.task.main,
        benchmark=_benchmark(parts.task, scores, scored) if parts.config.tuning is None else None,
        metrics={key: value for key, value in scores.items() if not key.startswith("loss")},
        splits=Splits(
            _rows(parts.task.kept(parts.train, parts.examples)),
            [_rows(parts.task.kept(each.split, each.examples)) for each in parts.evaluations],
        ),
        parameters=Parameters(max(counts), counts[-1], parts.budget, parts.head_parameters),
        search=search,
        notes=list(dict.fromkeys(note for each in scored for note in each.notes)),
        answers=[each.answers for each in scored if each.answers],
        weights=file_digest(folder / WEIGHTS) if parts.config.followed else "",
        cost=_cost(progress, parts, _save_model(folder, parts, scored)),
    )
    for name in ("predictions.parquet", "adapter/*", "model/*", WEIGHTS):
        for path in folder.glob(name):
            flush(path)  # a power cut must not leave a result without its files
    write_whole(folder / FILE, json.dumps(result.as_json(), indent=1, allow_nan=False) + "\n")
    clear(folder)
    return result


def _benchmark(task: Task, scores: dict[str, float], scored: list[Scored]) -> Benchmark | None:
    """The task's benchmark, its value in the benchmark's average, and that of always answering the same; or None."""
    if not task.benchmark:
        return None
    always = {name: value for each in scored if each.answers for name, value in each.answers.metrics.items()}
    average = lambda metrics: math.fsum(metrics[name] for name in task.averaged) / len(task.averaged)  # noqa: E731
    return Benchmark(task.benchmark, average(scores), average(always) if set(task.averaged) <= always.keys() else None)


def _write_predictions(folder: Path, scored: list[Scored]) -> None:
    rows = need("pyarrow", "bench").concat_tables([each.rows for each in scored])
    with unfinished(folder / "predictions.parquet") as temporary:
        need("pyarrow.parquet", "bench").write_table(rows, temporary)
        temporary.replace(folder / "predictions.parquet")
    for name, content in (item for each in scored for item in each.files.items()):
        write_whole(folder / name, content)
    if details := [each.answers.in_detail() for each in scored if each.answers and each.answers.confusion]:
        write_whole(folder / answers.FILE, json.dumps(details, ensure_ascii=False) + "\n")


def _save_model(folder: Path, parts: Parts, scored: Sequence[Scored]) -> int:
    """Save what was learnt: an adapter, or all of a model that changed. Returns its size in bytes without padding."""
    model: Any = None
    if isinstance(parts.model, PeftModel):
        if merged_sites(parts.model):
            model = parts.model.merge_and_unload()
    elif all(p.requires_grad for p in parts.model.parameters()):
        model = parts.model
    target = folder / ("adapter" if model is None else "model")
    use = Use.of(parts.config, parts.task, parts.base, parts.rows)
    processor = parts.processor and parts.task.dressed(parts.processor)
    if model is None:
        splits = [parts.train, *(each.split for each in parts.evaluations)]
        facts = Facts.of(parts.config, parts.task, parts.budget, splits, scored)
        save(parts.model, target, parts.method, parts.head, use, processor, facts)
    else:
        claim(folder, target.name)
        with unfinished(target, folder=True) as temporary:
            model.save_pretrained(temporary)
            if processor is not None:
                processor.save_pretrained(temporary)  # so that the folder can be used as `model:`
            replace(use, base="").write(temporary)
            replace_folder(target, temporary)
    own = {*TOKENIZER, USE, CARD} if model is None else {USE}
    whole = sum(path.stat().st_size for path in target.rglob("*") if path.is_file() and path.name not in own)
    with suppress(InputError):  # no LoRA, so nothing is padded
        return whole - padding(stored(target))
    return whole


def _cost(progress: Progress, parts: Parts, adapter_bytes: int) -> Cost:
    processes = together.count()
    spent = progress.carried.step_seconds
    halved = parts.rows < math.ceil(parts.config.batch_size / processes)
    return Cost(
        seconds=round(progress.carried.seconds, 3),
        peak_memory_bytes=progress.carried.peak_memory_bytes,
        examples_per_second=round(parts.plan.examples(parts.plan.steps) / spent, 3) if spent else 0.0,
        adapter_bytes=adapter_bytes,
        processes=processes if processes > 1 else None,
        micro_batch=parts.rows if halved else None,
    )


def _rows(split: Split) -> Rows:
    return Rows(split.name, len(split.data), split.official, split.note, split.own)
