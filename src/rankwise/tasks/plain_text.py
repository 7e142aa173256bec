"""Texts of anyone's own, for continued pre-training: `task: {type: text, dataset: …, columns: {text: …}}`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedTokenizerBase

from rankwise.errors import need
from rankwise.tasks.base import Split
from rankwise.tasks.custom import Custom
from rankwise.tasks.generation import IGNORE
from rankwise.tasks.language import Language, Row
from rankwise.tasks.source import Rows

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class PlainText(Custom, Language, name="text"):
    """Your own texts, all of whose tokens a decoder learns, in blocks of max_length. Perplexity and token accuracy.

    The texts of a split follow one another, an end token after each, and are cut into blocks of equal length.

    Attributes:
        columns: from role to column: text.
    """

    roles: ClassVar[tuple[str, ...]] = ("text",)
    text: ClassVar[tuple[str, ...]] = ("text",)
    target: ClassVar[str] = "text"
    answers = False

    def same(self, read: Any, answer: Any) -> bool:
        return False

    def table(self, rows: Rows) -> "pa.Table":
        return self._named(rows, {"text": need("pyarrow", "bench").string()}, ("text",))

    def rows(self, split: Split, processor: PreTrainedTokenizerBase, max_length: int) -> Iterator[Row]:
        left: list[int] = []
        texts: list[int] = []  # of each token the place of its text
        for first in range(0, len(split.data), 1_000):
            block = split.data[first : first + 1_000]["text"]
            for place, ids in enumerate(processor(block, verbose=False)["input_ids"], first):
                ended = ids if ids[-1:] == [processor.eos_token_id] else [*ids, processor.eos_token_id]
                left += ended
                texts += [place] * len(ended)
            whole = (len(left) - 1) // max_length * max_length  # something is left for the last block
            for start in range(0, whole, max_length):
                yield _block(texts[start], left[start : start + max_length])
            left, texts = left[whole:], texts[whole:]
        if len(left) > 1:
            yield _block(texts[0], left)


def _block(place: int, ids: list[int]) -> Row:
    return Row(place, ids, [IGNORE, *ids[1:]])  # the first has nothing to be predicted from
