"""Summaries of dialogues and titles of articles; ROUGE F1 with stemming.

    samsum          SAMSum (Gliwa et al. 2019, arXiv 1911.12237): `RANKWISE_DATA/samsum/<split>.parquet`, or
                    `knkarthick/samsum` on the hub; columns `dialogue` and `summary`
    titles          abstracts of SciTLDR (Cachola et al. 2020, arXiv 2004.15011) and the titles of their papers:
                    `RANKWISE_DATA/summarization/scitldr/<split>.parquet`, columns `article` and `title`, or the files
                    of its authors on the web, `source` and `title`
    medium-titles   articles from Medium and their titles: `RANKWISE_DATA/medium-articles/train.parquet`, or
                    `fabiochiu/medium-articles` on the hub; columns `text` and `title`

The tasks with titles are as in a course report on SoRA with T5: "summarize: " before the text, 512 tokens into 64.
"""

import hashlib
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rankwise.errors import InputError, need
from rankwise.metrics.rouge import per_example
from rankwise.tasks.base import REFERENCES, Split
from rankwise.tasks.generation import Generation, Judged
from rankwise.tasks.source import Origin, Rows, checked

if TYPE_CHECKING:
    import pyarrow as pa

SAMSUM = Origin("SAMSum", "samsum", "knkarthick/samsum")
_SCITLDR = "https://raw.githubusercontent.com/allenai/scitldr/master/SciTLDR-Data/SciTLDR-A"
SCITLDR = Origin(
    "SciTLDR",
    "summarization/scitldr",
    "json",  # the hub's own copy of these files lacks the titles
    files={
        "train": f"{_SCITLDR}/train.jsonl",
        "validation": f"{_SCITLDR}/dev.jsonl",
        "test": f"{_SCITLDR}/test.jsonl",
    },
)
MEDIUM = Origin(
    "Medium's articles", "medium-articles", "fabiochiu/medium-articles", files={"train": "medium_articles.csv"}
)


class Summarisation(Generation):
    """A shorter text from a text, scored by ROUGE against one reference or the best of several.

    ROUGE-L is the main metric, since it depends on the order of words.
    """

    main: ClassVar[str] = "rouge_l"
    metrics: ClassVar[tuple[str, ...]] = ("rouge_l", "rouge_1", "rouge_2")

    def score_texts(self, hypotheses: list[str], split: Split) -> Judged:
        references = split.data[REFERENCES if REFERENCES in split.data.column_names else self.target][:]
        scores = per_example(hypotheses, references)
        texts = [text for row in references for text in ([row] if isinstance(row, str) else row)]
        empty = sum(not re.search("[a-z0-9]", text.lower()) for text in texts)
        note = f"{empty} of {len(texts)} references have no word that ROUGE counts (a to z, 0 to 9)"
        metrics = {name: float(scores[name].mean()) for name in self.metrics}
        return Judged(metrics, scores[self.main].tolist(), (note,) if empty else ())


class Published(Summarisation):
    """A published dataset, read split by split."""

    def train(self) -> Split:
        return self._read("train")

    def evaluation(self) -> list[Split]:
        return [self._read(self.split)]

    @abstractmethod
    def _read(self, name: str) -> Split:
        """The split `name`: train, validation or test."""


@dataclass(frozen=True)
class SAMSum(Published, name="samsum"):
    """The summary of a chat between friends; ROUGE-L first."""

    target_length: int = 96

    def _read(self, name: str) -> Split:
        rows = SAMSUM.read(name)
        kept = rows.without_blanks("dialogue")  # one published training row has none
        table = _texts(kept, "dialogue", "summary")
        note = rows.note(name, {"train": 14_732, "validation": 818, "test": 819}[name], table.num_rows)
        return _split(rows.split, table, note, _left_out(rows, kept, "dialogue"))


@dataclass(frozen=True)
class Titles(Published, name="titles"):
    """The title of a paper on machine learning from its abstract; ROUGE-L first. Use max_length=512."""

    prefix: str = "summarize: "

    def _read(self, name: str) -> Split:
        pa = need("pyarrow", "bench")
        rows = SCITLDR.read(name)
        if "article" in rows.table.column_names:
            table = _texts(rows, "article", "title")
        else:  # the authors' files, with lists of sentences
            types = {"source": pa.list_(pa.string()), "title": pa.string()}
            columns = checked(rows, types, filled=("title",))
            sources = [" ".join(text.strip() for text in sentences) for sentences in columns["source"].to_pylist()]
            table = pa.table({"source": sources, "target": columns["title"]})
        note = rows.note(name, {"train": 1_992, "validation": 619, "test": 618}[name])
        return _split(rows.split, table, note, "there are no published scores of these titles")


@dataclass(frozen=True)
class MediumTitles(Published, name="medium-titles"):
    """The title of an article from Medium, 190,000 of them; ROUGE-L first. Use max_length=512.

    All are in one file. A digest of each article puts 2 in 100 into validation and 2 into test; repeated articles count
    once.
    """

    prefix: str = "summarize: "

    def _read(self, name: str) -> Split:
        digests = {"train": range(4, 100), "validation": range(0, 2), "test": range(2, 4)}[name]
        rows = MEDIUM.read("train")
        kept = rows.without_blanks("text", "title")
        texts = _texts(kept, "text", "title").to_pydict()
        titles = {text: title for text, title in zip(*texts.values(), strict=True) if _draw(text) in digests}
        if not titles:
            raise InputError(f"{rows.where} has too few articles for a {name} split: {rows.remedy}")
        table = need("pyarrow", "bench").table({"source": list(titles), "target": list(titles.values())})
        return _split(name, table, "split by rankwise", _left_out(rows, kept, "text or title"))


def _draw(text: str) -> int:
    """A number from 0 to 99 that depends only on the text."""
    return int(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8], 16) % 100


def _texts(rows: Rows, source: str, target: str) -> "pa.Table":
    """The two columns of a task, checked, as `source` and `target`."""
    types = dict.fromkeys((source, target), need("pyarrow", "bench").string())
    return checked(rows, types, filled=(source, target)).rename_columns(["source", "target"])


def _left_out(rows: Rows, kept: Rows, what: str) -> str:
    missing = rows.table.num_rows - kept.table.num_rows
    return f"{missing:,} rows without {what} left out" if missing else ""


def _split(name: str, table: "pa.Table", *notes: str) -> Split:
    datasets = need("datasets", "bench")
    table = table.append_column("idx", need("pyarrow", "bench").array(range(table.num_rows)))
    note = "; ".join(filter(None, notes))
    return Split(name, datasets.Dataset(table), not note, note)
