"""E2E NLG (Novikova et al. 2017, arXiv 1706.09254; Dušek et al. 2020): describe a restaurant from its attributes.

`RANKWISE_DATA/e2e/<split>.parquet` or `tuetschek/e2e_nlg` on the hub, columns `meaning_representation` and
`human_reference`. A model trains on one row per reference, and is scored on one per meaning representation, against all
of its references (validation 4,672 rows in 547 groups, test 4,693 in 630). `GEM/e2e_nlg` is a different, cleaned set.

Rows are official if the numbers of rows and of groups are the published ones. A copy of the training file that was
rebuilt from tokenised text has the same numbers, and is recognised by a digest of its texts.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.errors import need
from rankwise.metrics.e2e import bleu_statistics, e2e, unavailable
from rankwise.tasks.base import REFERENCES, Split
from rankwise.tasks.generation import Generation, Judged
from rankwise.tasks.source import Origin, checked

if TYPE_CHECKING:
    import pyarrow as pa

# The repository has a script, of which the hub keeps parquet files.
ORIGIN = Origin("E2E", "e2e", "tuetschek/e2e_nlg", revision="refs/convert/parquet")
OFFICIAL = {"train": (42_061, 4_862), "validation": (4_672, 547), "test": (4_693, 630)}
"""Rows and meaning representations of each split."""
REBUILT = "9c22bc1d31d9"
"""Digest of the training texts that were rebuilt from the tokenised copy."""


@dataclass(frozen=True)
class E2E(Generation, name="e2e"):
    """A text from a restaurant's attributes, trained and decoded as for LoRA's GPT-2; BLEU first.

    Decoding is as in the paper: 10 beams, length penalty 0.9 (0.8 in the README of its code), no 4-gram twice.
    Published scores are on `split: test`: choose settings on `validation`, the default; score only the best on `test`.
    """

    main: ClassVar[str] = "bleu"
    metrics: ClassVar[tuple[str, ...]] = ("bleu", "nist", "meteor", "rouge_l", "cider")

    target_length: int = 128
    beams: int = 10
    length_penalty: float = 0.9
    no_repeat: int = 4

    def train(self) -> Split:
        table, name, note = _read("train")
        sources, targets = table["meaning_representation"], table["human_reference"]
        columns = {"source": sources, "target": targets, "idx": list(range(table.num_rows))}
        return Split(name, need("datasets", "bench").Dataset(need("pyarrow", "bench").table(columns)), not note, note)

    def evaluation(self) -> list[Split]:
        table, name, note = _read(self.split)
        if not note and self.split != "test":
            note = "published scores are on the test rows"
        data = _grouped(table["meaning_representation"].to_pylist(), table["human_reference"].to_pylist())
        return [Split(name, data, not note, note)]

    def tuning(self, whole: Split, part: float, train_rows: int | None = None) -> tuple[Split, Split]:
        """As for any task, with all references of the rows that are held out."""
        rest, held_out = super().tuning(whole, part, train_rows)
        if REFERENCES in held_out.data.column_names:
            return rest, held_out
        data = _grouped(held_out.data["source"][:], held_out.data["target"][:])
        return rest, replace(held_out, data=data, note=f"{held_out.note}; all references of a source in one row")

    def score_texts(self, hypotheses: list[str], split: Split) -> Judged:
        missing = unavailable()
        references = split.data[REFERENCES][:]
        return Judged(
            e2e(hypotheses, references),
            notes=(missing,) if missing else (),
            statistics=bleu_statistics(hypotheses, references),
        )


def _grouped(sources: list[str], references: list[str]) -> Any:
    """A row for each source, with all of its references."""
    groups: dict[str, list[str]] = {}
    for source, reference in zip(sources, references, strict=True):
        groups.setdefault(source, []).append(reference)
    columns = {"source": list(groups), REFERENCES: list(groups.values()), "idx": list(range(len(groups)))}
    return need("datasets", "bench").Dataset.from_dict(columns)


def _read(split: str) -> tuple["pa.Table", str, str]:
    """The rows of a split, its name, and a note if it is not the official one."""
    columns = ("meaning_representation", "human_reference")
    rows = ORIGIN.read(split)
    table = checked(rows, dict.fromkeys(columns, need("pyarrow", "bench").string()), filled=columns)
    total, groups = OFFICIAL[split]
    note = rows.note(split, total)
    count = len(table["meaning_representation"].unique())
    if not note and count != groups:
        note = f"{rows.split}: {count:,} meaning representations, not the official {groups:,} of {split}"
    if not note and split == "train" and digest(table) == REBUILT:
        note = "rebuilt from a tokenised copy: all official rows in order, spaces within references may differ"
    return table, rows.split, note


def digest(table: "pa.Table") -> str:
    """12 hex digits of all texts of E2E rows in their order, wherever and however they are stored."""
    sha = hashlib.sha256()
    for row in table.to_pylist():
        sha.update(f"{row['meaning_representation']}\t{row['human_reference']}\n".encode())
    return sha.hexdigest()[:12]
