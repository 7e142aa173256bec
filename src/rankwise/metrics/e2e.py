"""The five metrics of the E2E NLG challenge (Dušek et al. 2020), with the values of its official script.

Every function takes `hypotheses`, n texts, and `references`, n lists of one or more texts each, and raises InputError
for counts that differ, for nothing at all and for a reference without text. A hypothesis may be empty, as a model's
output may: it matches nothing. Runs of white space count as one space.

METEOR, ROUGE-L and CIDEr are defined on text cut by the Penn Treebank tokenizer, a Java program, and METEOR is one
too. Both come with pycocoevalcap; a Java runtime does not. Where there is none `e2e` leaves these three out, and
`unavailable` says why. Nothing stands in for them: with another tokenizer the values are others.
"""

import contextlib
import math
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rankwise.errors import InputError, need
from rankwise.metrics.metric import FROM_ZERO, Metric

_EXTRA = "nlg"
_NIST_ORDER = 5


def e2e(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` (0 to 100), `nist` (from 0), `meteor` and `rouge_l` (0 to 1) and `cider` (0 to 10), of whole sets.

    Without Java only `bleu` and `nist`; `unavailable()` says why. METEOR reads its paraphrase table first: 10 s or so.

    Raises InputError as the module says, and where Java ends early or answers nothing.
    """
    hypotheses, references = _texts(hypotheses, references)
    scores = {"bleu": bleu(hypotheses, references), "nist": _nist(hypotheses, references)}
    if unavailable():
        return scores
    cut, wanted = _ptb(hypotheses, references)
    return scores | {
        "meteor": _meteor(cut, wanted),
        "rouge_l": _rouge_l(cut, wanted),
        "cider": _cider(cut, wanted),
    }


def unavailable() -> str:
    """Why METEOR, ROUGE-L and CIDEr cannot be had on this machine, in one line; "" where they can."""
    java = shutil.which("java")
    if java is None:
        return "METEOR, ROUGE-L and CIDEr need a Java runtime, and there is no java on the PATH"
    try:
        # On macOS `java` exists without a runtime, so that only starting it can tell.
        answer = subprocess.run([java, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"METEOR, ROUGE-L and CIDEr need a Java runtime, and {java} does not start: {type(error).__name__}"
    if answer.returncode:
        return f"METEOR, ROUGE-L and CIDEr need a Java runtime, and {java} does not start: {_last(answer.stderr)}"
    return ""


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 without case, 0 to 100 (Papineni et al. 2002), as mteval-v13a, by sacrebleu.

    Of a segment's references the one nearest in length counts for brevity; an order without a match is smoothed
    exponentially. A set in which no text has four words scores 0.
    """
    return float(bleu_of(bleu_statistics(hypotheses, references).sum(axis=0)))


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What BLEU counts in each hypothesis, (n, 10) whole numbers; their sums over a set decide its BLEU (`bleu_of`).

    In this order: n-grams that a reference has too, n = 1 to 4; all n-grams, n = 1 to 4; the lengths of the hypothesis
    and of the reference nearest to it.
    """
    # effective_order has no part in the counts: without it sacrebleu writes advice on the log for each text
    metric = need("sacrebleu.metrics", _EXTRA).BLEU(lowercase=True, effective_order=True)
    found = [metric.sentence_score(*pair) for pair in zip(*_texts(hypotheses, references), strict=True)]
    return np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found])


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """`bleu` of sets (…) from the sums (…, 10) of their texts' `bleu_statistics`."""
    compute = need("sacrebleu.metrics", _EXTRA).BLEU.compute_bleu
    rows = sums.reshape(-1, sums.shape[-1]).astype(int).tolist()
    scores = [compute(row[:4], row[4:8], *row[8:], smooth_method="exp").score for row in rows]
    # the exponential of mean logarithms passes 100 by rounding
    return np.minimum(scores, 100.0).reshape(sums.shape[:-1])


METRICS = {
    "bleu": Metric((0.0, 100.0), bleu_of),
    **dict.fromkeys(("meteor", "rouge_l"), Metric()),
    **dict.fromkeys(("nist", "cider"), Metric(FROM_ZERO)),
}


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST-5 without case, from 0 without an upper end (Doddington 2002, equations 2 and 3), as mteval-v13a.

    Each shared n-gram, n = 1 to 5, counts with its information log₂(#w₁…wₙ₋₁ / #w₁…wₙ) over all references, divided
    by the number of hypothesis n-grams; the penalty exp(β ln² min(1, L/L̄)) is ½ at L/L̄ = ⅔, where L̄ takes the mean
    length of a segment's references. nltk's function takes another length.
    """
    return _nist(*_texts(hypotheses, references))


def _texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Both sides checked, each text on one line with single spaces; ready texts pass through unchanged."""
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise InputError("hypotheses must be a list of texts and references a list of lists of texts, not one text")
    if len(hypotheses) != len(references):
        raise InputError(
            f"{len(hypotheses)} hypotheses and {len(references)} groups of references: there must be one group for each"
        )
    if not hypotheses:
        raise InputError("there are no hypotheses to score")
    for row, (hypothesis, group) in enumerate(zip(hypotheses, references, strict=True)):
        if not isinstance(hypothesis, str):
            raise InputError(f"hypothesis {row} is {type(hypothesis).__name__}, not text")
        if isinstance(group, str):
            raise InputError(f"references of hypothesis {row} are one text: give a list, of one text or more")
        if not group:
            raise InputError(f"hypothesis {row} has no references: give one or more")
        if not all(isinstance(text, str) and text.strip() for text in group):
            raise InputError(f"hypothesis {row} has a reference without text: leave that reference out")
    return [" ".join(text.split()) for text in hypotheses], [[" ".join(t.split()) for t in g] for g in references]


def _nist(hypotheses: list[str], references: list[list[str]]) -> float:
    tokenize = need("sacrebleu.tokenizers.tokenizer_13a", _EXTRA).Tokenizer13a()

    def grams(text: str) -> list[Counter[tuple[str, ...]]]:
        words = tokenize(text.lower()).split()
        return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, _NIST_ORDER + 1)]

    wanted = [[grams(text) for text in group] for group in references]
    seen: Counter[tuple[str, ...]] = Counter()
    for group in wanted:
        for text in group:
            for counts in text:
                seen.update(counts)
            seen[()] += text[0].total()  # the empty gram stands before every word
    information, grams_made = [0.0] * _NIST_ORDER, [0] * _NIST_ORDER
    length, mean_length = 0, 0.0
    for hypothesis, group in zip(hypotheses, wanted, strict=True):
        for order, made in enumerate(grams(hypothesis)):
            most: Counter[tuple[str, ...]] = Counter()
            for text in group:
                most |= text[order]
            for gram, count in (made & most).items():
                information[order] += count * math.log2(seen[gram[:-1]] / seen[gram])
            grams_made[order] += made.total()
            length += made.total() if order == 0 else 0
        mean_length += sum(text[0].total() for text in group) / len(group)
    if not length:
        return 0.0
    gain = sum(found / made for found, made in zip(information, grams_made, strict=True) if made)
    shortness = math.log(min(1.0, length / mean_length)) / math.log(1.5)
    return gain * 0.5 ** (shortness**2)


def _ptb(hypotheses: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Both sides in lower case, cut by the Penn Treebank tokenizer, without punctuation, one space between words."""
    jar = _jar("tokenizer.ptbtokenizer", "stanford-corenlp-*.jar")
    texts = hypotheses + [text for group in references for text in group]
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command = _java("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options)
    lines = "".join(f"{text}\n" for text in texts).encode(errors="replace")
    patience = _patience(len(texts))
    try:
        answer = subprocess.run(command, input=lines, capture_output=True, timeout=patience)
    except subprocess.TimeoutExpired:
        raise InputError(f"the PTB tokenizer (Java) did not finish within {patience} s: try again") from None
    except OSError as error:
        raise InputError(f"the PTB tokenizer (Java) does not start: {error}") from None
    if answer.returncode:
        raise InputError(f"the PTB tokenizer (Java) failed, status {answer.returncode}: {_last(answer.stderr)}")
    punctuation = frozenset(need("pycocoevalcap.tokenizer.ptbtokenizer", _EXTRA).PUNCTUATIONS)
    cut = [
        " ".join(word for word in line.split() if word not in punctuation)
        for line in answer.stdout.decode(errors="replace").split("\n")[:-1]
    ]
    if len(cut) != len(texts):  # every text after a line too many would be scored against another's references
        raise InputError(f"the PTB tokenizer (Java) returned {len(cut)} lines for {len(texts)} texts")
    rest = iter(cut[len(hypotheses) :])
    return cut[: len(hypotheses)], [[next(rest) for _ in group] for group in references]


def _meteor(hypotheses: list[str], references: list[list[str]]) -> float:
    """METEOR 1.5 for English, 0 to 1 (Denkowski and Lavie 2014), of texts that `_ptb` has cut.

    The set's value comes from the sums of all segments' statistics and is not the mean of theirs.
    """
    with _meteor_process(_patience(len(hypotheses))) as ask:
        statistics = []
        for hypothesis, group in zip(hypotheses, references, strict=True):
            # ||| separates the fields of a line, so that no text may hold it
            fields = [text.replace("|||", "") for text in (*group, hypothesis)]
            statistics += ask(f"SCORE ||| {' ||| '.join(fields)}", 1)
        # one value for each segment, then the set's
        answers = ask(f"EVAL ||| {' ||| '.join(statistics)}", len(statistics) + 1)
    try:
        value = float(answers[-1])
    except ValueError:
        raise InputError(f"METEOR (Java) answered {answers[-1]!r} where a number should be") from None
    return value if math.isfinite(value) else 0.0


@contextlib.contextmanager
def _meteor_process(patience: float) -> Iterator[Callable[[str, int], list[str]]]:
    """METEOR's process as a function (line, number of answers) → answers; it is over when the block is.

    InputError where it ends early or takes longer than `patience` seconds in all.
    """
    jar = _jar("meteor.meteor", "meteor-1.5.jar")
    command = _java("-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm")
    late = threading.Event()
    # A file for what it complains of: a pipe without a reader could fill up and stop it.
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints)
        except OSError as error:
            raise InputError(f"METEOR (Java) does not start: {error}") from None
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def give_up() -> None:
            late.set()
            process.kill()

        def ask(line: str, answers: int) -> list[str]:
            with contextlib.suppress(OSError):  # a process that has ended; reading tells
                to.write(line.encode(errors="replace") + b"\n")
                to.flush()
            lines = [back.readline() for _ in range(answers)]
            if lines[-1].endswith(b"\n"):
                return [line.decode(errors="replace").strip() for line in lines]
            if late.is_set():
                raise InputError(f"METEOR (Java) did not finish within {patience:.0f} s: try again")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # it has closed its output and is about to end, with a status of its own
            process.kill()
            status = process.wait()
            complaints.seek(0)
            raise InputError(f"METEOR (Java) failed, status {status}: {_last(complaints.read())}")

        timer = threading.Timer(patience, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield ask
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            timer.join()
            for pipe in (to, back):
                with contextlib.suppress(OSError):  # what could not be written is still in the buffer
                    pipe.close()


def _rouge_l(hypotheses: list[str], references: list[list[str]]) -> float:
    """ROUGE-L, 0 to 1 (Lin 2004, equation 4 with β = 1.2), of texts that `_ptb` has cut: the mean over the texts.

    Precision and recall may each be from another reference, as in the official script.
    """
    rouge = need("pycocoevalcap.rouge.rouge", _EXTRA)
    return float(
        rouge.Rouge().compute_score(dict(enumerate(references)), {i: [t] for i, t in enumerate(hypotheses)})[0]
    )


def _cider(hypotheses: list[str], references: list[list[str]]) -> float:
    """CIDEr-D with σ = 6, 0 to 10 (Vedantam et al. 2015), of texts that `_ptb` has cut: the mean over the texts.

    A word counts by how few groups have it, so that one group alone scores 0.
    """
    if not any(text for group in references for text in group):
        return 0.0
    cider = need("pycocoevalcap.cider.cider", _EXTRA)
    return float(
        cider.Cider().compute_score(dict(enumerate(references)), {i: [t] for i, t in enumerate(hypotheses)})[0]
    )


def _jar(module: str, pattern: str) -> Path:
    """The Java archive beside `module` of pycocoevalcap, whose paraphrase table it finds by itself."""
    folder = Path(str(need(f"pycocoevalcap.{module}", _EXTRA).__file__)).resolve().parent
    found = sorted(folder.glob(pattern))
    if not found:
        raise InputError(f"{folder} has no {pattern}: install pycocoevalcap 1.2 again")
    return found[-1]


def _java(*arguments: str) -> list[str]:
    # Java before 18 takes its encoding from the locale, and "Café" would differ under LANG=C.
    return [shutil.which("java") or "java", "-Dfile.encoding=UTF-8", *arguments]


def _patience(texts: int) -> int:
    """Seconds after which a Java process counts as hanging: many times what a slow machine takes."""
    return 600 + texts


def _last(complaints: bytes) -> str:
    """The last line of what a process complained of, in one line."""
    lines = [line.strip() for line in complaints.decode(errors="replace").splitlines() if line.strip()]
    # below an exception's own line Java prints where it came from
    said = [line for line in lines if not re.match(r"(at |\.\.\. \d+ more)", line)]
    return said[-1] if said else "it said nothing"
