"""What the methods wrote, next to each other."""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from rankwise.report.examples import examples
from rankwise.results.rows import best, summarise
from rankwise.runs.store import Store
from runs import config, finish


def test_what_the_model_wrote_before_training_comes_first_and_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, text in (("full", "after"), ("none", "before"), ("lora", "after, too")):
        folder = finish(store, config(method={"name": name}), 0.5)
        rows = {"split": ["validation"], "idx": [0], "source": ["?"], "references": [["!"]], "prediction": [text]}
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / "predictions.parquet")
    [example] = examples(best(summarise(store.results())))
    assert list(example.outputs.items()) == [
        ("none (the model as it comes)", "before"),
        ("full", "after"),
        ("lora", "after, too"),
    ]
