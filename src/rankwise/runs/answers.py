"""How the answers to a split are spread, so that a score can be told from that of one answer to everything."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rankwise.files import read_json

FILE = "answers.json"
"""Of a run: by split, which class was taken for which, and the wrong answers that the model was surest of."""
WRONG = 20
"""Wrong answers of a split that are kept."""
LONGEST = 400
"""Characters of each text that is kept with them."""
_SHOWN = 60
"""Characters of an answer in a sentence."""


@dataclass(frozen=True)
class Wrong:
    """A row for which a wrong class was predicted.

    Attributes:
        idx: the row's number.
        texts: what the model read, cut to LONGEST characters each.
        true, given: class numbers.
        confidence: the probability that the model gave to `given`.
    """

    idx: int
    texts: list[str]
    true: int
    given: int
    confidence: float


@dataclass(frozen=True)
class Answers:
    """How the answers to one split are spread.

    Attributes:
        split: its name.
        total: number of answers.
        commonest: the most frequent one; "" for none.
        count: how often that is.
        majority: the class that most rows have; "" without classes or labels.
        majority_count: how many rows have it, or the label that most rows have if there are no classes; 0 without
            labels.
        tied: other classes that as many rows have as `majority`.
        metrics: what it would score to answer that always, by the names in the results; {} if that is not known.
        what: what the answers are called in a sentence.
        classes: names of the classes.
        confusion: (true, given, how many), class numbers.
        wrong: the wrong answers that the model was surest of.
    """

    split: str
    total: int
    commonest: str
    count: int
    majority: str = ""
    majority_count: int = 0
    tied: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    what: str = "answers"
    classes: Sequence[str] = ()
    confusion: Sequence[tuple[int, int, int]] = ()
    wrong: Sequence[Wrong] = ()

    @property
    def share(self) -> float:
        """The share of the most frequent answer; 0 without answers."""
        return self.count / self.total if self.total else 0.0

    @property
    def nothing_learnt(self) -> str:
        """A sentence if all answers are the same, else ""."""
        if self.count < self.total or self.total < 2:
            return ""
        same = f"all {self.total:,} {self.what} are {shown(self.commonest)}"
        if self.majority_count == self.total:
            return f"{same}, and all labels are the same: these rows show nothing"
        if not self.majority:
            return f"{same}: nothing was learnt"
        first = [self.majority, *self.tied]
        if self.commonest not in first:
            classes = "classes are" if self.tied else "class is"
            return f"{same}, and the commonest {classes} {listed(first)}: nothing was learnt"
        which = f"one of the commonest classes, {listed(first)}" if self.tied else "the commonest class"
        return f"{same}, {which}: nothing was learnt"

    def in_result(self) -> dict[str, Any]:
        """The part that goes into a result."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("classes", "confusion", "wrong")}
        return {**kept, "share": self.share}

    def in_detail(self) -> dict[str, Any]:
        """The part that goes into FILE."""
        return asdict(Detail(self.split, self.classes, self.confusion, self.wrong))


@dataclass(frozen=True)
class Detail:
    """What FILE holds of one split; as in `Answers`."""

    split: str
    classes: Sequence[str]
    confusion: Sequence[tuple[int, int, int]]
    wrong: Sequence[Wrong]


_KEPT, _DETAILS = TypeAdapter(list[Answers]), TypeAdapter(list[Detail])


def undamaged(kept: Any) -> list[Answers]:
    """The answers in a result; [] if they are damaged, as the result counts without them."""
    try:
        return _KEPT.validate_python(kept)
    except ValidationError:
        return []


def details(folder: Path) -> list[Detail]:
    """The content of FILE of a run; [] if it is missing or damaged."""
    try:
        return _DETAILS.validate_python(read_json(folder / FILE))
    except (OSError, ValueError):  # InputError and pydantic's error are of this kind
        return []


def listed(answers: Sequence[str]) -> str:
    """`'a'`, `'a' and 'b'`, `'a', 'b' and 2 more`: answers in a sentence."""
    names = [shown(answer) for answer in answers]
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def shown(answer: str) -> str:
    """An answer in a sentence, in quotes and not long."""
    return repr(answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}…")
