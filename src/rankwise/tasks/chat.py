"""Conversations of anyone's own: `task: {type: chat | instruct, dataset: …}`.

    type       columns
    chat       messages, or conversations: a list of turns, each with role and content, or with from and value
    instruct   prompt, completion; or instruction, input, output

A turn of a list is OpenAI's or ShareGPT's; a list may also be JSON in a text. `chat` reads a column `tools` too, and
`system`, which comes before the list; so does `instruct`. The answers are learnt, as `templates` tells them apart.
"""

import hashlib
import itertools
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.errors import InputError, nearest, need
from rankwise.processes.launched import is_main
from rankwise.tasks.base import Split, evaluating, tell, text_of
from rankwise.tasks.custom import Custom
from rankwise.tasks.generation import IGNORE, batches
from rankwise.tasks.language import Language, Row, continued, end_tokens, room
from rankwise.tasks.source import MEND, Rows, checked, read
from rankwise.tasks.templates import Conversation, Template, own

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names of roles."""
LISTS = ("messages", "tools", "history")
"""Roles of columns that have lists."""
WEIGHTS = ("weight", "loss_weight", "train", "training")
"""Keys of a turn that say whether it is learnt, in the files of OpenAI, LLaMA-Factory and axolotl."""
AFTER: dict[str, tuple[str, ...]] = {
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> those that it may come after, "" being the beginning."""
AT_TURN, IN_ANSWER = "cut after an answer", "cut within an answer"
LEFT_OUT = "left out, since no answer begins before that"
"""What becomes of a row that is longer than max_length."""


@dataclass(frozen=True)
class Conversations(Language):
    """Conversations, of which the answers are learnt.

    Attributes:
        template: file of a chat template in Jinja, instead of the tokenizer's own.
    """

    form = "chat"
    text = ("source",)
    target = "conversation"
    grouped = ("opening",)

    template: str = ""

    @property
    def asked(self) -> dict[str, str]:
        return {"messages": "messages"}

    def question(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A conversation up to what is asked; an answer that comes last in the row is left out."""
        return self._asked(_listed(row.get("messages"), where, "messages"), None, where)

    def _asked(self, turns: list[Any], tools: list[Any] | None, where: str) -> dict[str, Any]:
        """A conversation, of which the last turn asks, as JSON; `turns` are checked as for training."""
        style = "from" if isinstance(turns[0], dict) and "from" in turns[0] else "role"
        last = turns[-1] if isinstance(turns[-1], dict) else {}
        if last.get(style) in ("assistant", *(name for name, role in ROLES.items() if role == "assistant")):
            turns = turns[:-1]
        stand_in = {style: "assistant", "content" if style == "role" else "value": "?"}
        messages, _ = _checked([*turns, stand_in], where, style)
        return {"conversation": json.dumps([messages[:-1], tools, []], ensure_ascii=False), "where": where}

    def answer(
        self, model: nn.Module, questions: Sequence[Mapping[str, Any]], processor: Any, max_length: int, batch_size: int
    ) -> list[dict[str, Any]]:
        """What the model answers, in at most `max_length` tokens."""
        template, most = Template.of(processor, self._own, self.template), room(model)
        prompts = template.prompts([_conversation(each["conversation"], each["where"]) for each in questions])
        for each, prompt in zip(questions, prompts, strict=True):
            if most is not None and len(prompt) >= most:
                raise InputError(f"{each['where']}: {len(prompt)} tokens are too many for the {most} of the model")
        ends, texts = end_tokens(processor, [template.example()]), [""] * len(prompts)
        with evaluating(model):
            for rows in batches([*map(len, prompts)], batch_size):
                written = continued(model, [prompts[row] for row in rows], ends, max_length, processor)
                for row, text in zip(rows, written, strict=True):
                    texts[row] = text
        return [{"prediction": text} for text in texts]

    def dressed(self, processor: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        own = copy(processor)
        own.chat_template = Template.of(processor, self._own, self.template).text or processor.chat_template
        return own

    def changed_options(self, omit: Sequence[str] = ()) -> list[str]:
        options = super().changed_options((*omit, "template"))
        return [*options, f"template={Path(self.template).name}"] if self.template else options

    def revision(self, splits: Sequence[Split] | None = None, tuning: bool = False) -> str:
        found = super().revision(splits, tuning)
        return hashlib.sha256(f"{found}\n{self._own}".encode()).hexdigest()[:12] if self.template else found

    def rows(self, split: Split, processor: PreTrainedTokenizerBase, max_length: int) -> Iterator[Row]:
        template, cuts = Template.of(processor, self._own, self.template), Counter[str]()
        encoded = (
            template.encode([*map(_conversation, block["conversation"], block["where"])])
            for block in split.data.iter(1_000)
        )
        for place, (ids, answers) in enumerate(itertools.chain.from_iterable(encoded)):
            whole = [stop for _, stop in answers if stop <= max_length]
            cut = "" if len(ids) <= max_length else AT_TURN if whole else IN_ANSWER
            ids = ids[: whole[-1]] if cut == AT_TURN else ids[:max_length]
            labels = [IGNORE] * len(ids)
            for start, stop in answers:
                start = max(start, 1)  # the first token has nothing to be predicted from
                labels[start:stop] = ids[start:stop]
            learns = any(label != IGNORE for label in labels)
            cuts[cut if learns else LEFT_OUT] += 1
            if learns:
                yield Row(place, ids, labels, cut)
        if (note := _note(cuts, len(split.data), f"max_length = {max_length}")) and is_main():
            tell(f"{split.name} rows of {self.label}: {note}")

    def kept(self, split: Split, examples: "Dataset") -> Split:
        places = examples["idx"][:]
        cuts = Counter(examples["cut"][:])
        cuts[LEFT_OUT] = len(split.data) - len(places)
        note = _note(cuts, len(split.data))
        data = split.data.select(places, keep_in_memory=True) if cuts[LEFT_OUT] else split.data
        return replace(split, data=data, note="; ".join(filter(None, (split.note, note))))

    @cached_property
    def _own(self) -> str:
        """The text of the template's file, "" for none."""
        return own(self.template) if self.template else ""


@dataclass(frozen=True)
class OwnConversations(Custom, Conversations):
    """Conversations of a user's files."""

    questions: ClassVar[tuple[str, ...]]
    """The roles of what is asked, of which a row has one."""

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def asked(self) -> dict[str, str]:
        read = vars(self).get("_train")  # the training rows, if they were read
        role = self._question(read[0].table.column_names if read else ())
        return {role: self.columns.get(role, role)}

    def _question(self, names: Collection[str]) -> str:
        """The role of what is asked in rows with columns of these names."""
        there = [role for role in self.questions if role in self.columns or role in names]
        return (there or [*self.questions])[0]

    def question(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """As in training, but without an answer."""
        pa, row = need("pyarrow", "bench"), dict(row)
        role = self._question(row)
        if (column := self.columns.get(role, role)) not in row:
            text_of(row, column, where)
        used = {self.columns.get(each, each) for each in (*self.roles, *self.questions)}  # other columns hold anything
        read = {key: each for key, each in row.items() if key in used}
        cells = {key: json.dumps(each) if isinstance(each, list | dict) else each for key, each in read.items()}
        table = pa.table({key: [each] for key, each in {**cells, **self._stand_in(role)}.items()})
        [(turns, tools)] = self.conversations(Rows(table, "", where, MEND, "row"))
        return self._asked(turns, tools, where)

    def _stand_in(self, role: str) -> dict[str, Any]:
        """Columns in the place of answers, which a row need not have."""
        return {}

    @abstractmethod
    def conversations(self, rows: Rows) -> Iterator[tuple[list[Any], list[Any] | None]]:
        """The turns of each row, and its tools, as they are in the file. InputError for a column that is missing."""

    def same(self, read: Any, answer: Any) -> bool:
        return False

    def fetch(self, name: str, dataset: str = "") -> Rows:
        texts = {self.columns.get(role, role) for role in self.roles if role not in LISTS}
        return read(dataset or self.dataset, name, texts)

    def table(self, rows: Rows) -> "pa.Table":
        assert self._own is not None  # to fail now, not after hours
        return table_of(self._checked(rows))

    def _checked(self, rows: Rows) -> Iterator[Conversation]:
        style = ""
        for place, (turns, tools) in enumerate(self.conversations(rows)):
            where = f"{rows.where}, {rows.at(place)}"
            style = style or ("from" if isinstance(turns[0], dict) and "from" in turns[0] else "role")
            messages, learnt = _checked(turns, where, style)
            yield Conversation(messages, where, tools, learnt)

    def _cells(self, rows: Rows, role: str) -> list[Any]:
        """The values of an optional column, as texts if it is none of LISTS; None where there is none or a blank."""
        column = self.columns.get(role, role)
        if role not in self.columns and column not in rows.table.column_names:
            return [None] * rows.table.num_rows
        if column not in rows.table.column_names or column in rows.mixed:
            checked(rows, {column: None})
        values = rows.table[column].to_pylist()
        if role in LISTS:
            return values
        for place, value in enumerate(values):
            if isinstance(value, list | dict):
                raise InputError(f"{rows.where}: {column} in {rows.at(place)} is no text: {rows.remedy}")
        return [None if value is None or not str(value).strip() else str(value) for value in values]


@dataclass(frozen=True)
class Chat(OwnConversations, name="chat"):
    """Your own conversations, whose answers a decoder learns. Perplexity and accuracy of the answers' tokens.

    Attributes:
        columns: from role to column: messages, system, tools.
    """

    roles: ClassVar[tuple[str, ...]] = ("messages", "system", "tools")
    questions = ("messages", "conversations")

    def conversations(self, rows: Rows) -> Iterator[tuple[list[Any], list[Any] | None]]:
        names = [name for name in ("messages", "conversations") if name in rows.table.column_names]
        if "messages" not in self.columns and len(names) == 2:
            raise InputError(
                f"{rows.where} has the columns messages and conversations: name one of them, columns: {{messages: …}}"
            )
        column = self.columns.get("messages", next(iter(names), "messages"))
        checked(rows, {column: None})
        cells = zip(
            rows.table[column].to_pylist(), self._cells(rows, "system"), self._cells(rows, "tools"), strict=True
        )
        for place, (turns, system, tools) in enumerate(cells):
            where = f"{rows.where}, {rows.at(place)}"
            turns = _listed(turns, where, column)
            if system:
                style = ("from", "value") if isinstance(turns[0], dict) and "from" in turns[0] else ("role", "content")
                turns = [dict(zip(style, ("system", system), strict=True)), *turns]
            yield turns, _listed(tools, where, "tools") if tools not in _NONE else None


@dataclass(frozen=True)
class Instruct(OwnConversations, name="instruct"):
    """Your own prompts and what to answer, learnt by a decoder. Perplexity and accuracy of the answers' tokens.

    Attributes:
        columns: from role to column: prompt and completion, or instruction, input and output; system; and history, a
            list of earlier questions with their answers.
    """

    roles: ClassVar[tuple[str, ...]] = ("prompt", "completion", "instruction", "input", "output", "system", "history")
    questions = ("prompt", "instruction")

    def _stand_in(self, role: str) -> dict[str, Any]:
        role = {"prompt": "completion", "instruction": "output"}[role]
        return {self.columns.get(role, role): "?"}

    def conversations(self, rows: Rows) -> Iterator[tuple[list[Any], list[Any] | None]]:
        pa = need("pyarrow", "bench")
        pairs, names = (("prompt", "completion"), ("instruction", "output")), rows.table.column_names
        named = [pair for pair in pairs if {*pair} & {*self.columns}]
        there = named or [pair for pair in pairs if {*pair} & {*names}]
        if len(there) != 1:
            found = "not both" if there else f"not {', '.join(names)}"
            raise InputError(
                f"{rows.where} needs the columns prompt and completion, or instruction and output, {found}: name them "
                "at columns"
            )
        table = self._named(rows, dict.fromkeys(there[0], pa.string()), there[0])
        inputs = self._cells(rows, "input") if there[0][0] == "instruction" else [None] * table.num_rows
        others = self._cells(rows, "system"), self._cells(rows, "history")
        for place, (asked, answer, more, system, history) in enumerate(
            zip(*table.columns, inputs, *others, strict=True)
        ):
            earlier: list[Any] = []
            for pair in _listed(history, f"{rows.where}, {rows.at(place)}", "history") if history not in _NONE else ():
                if not isinstance(pair, list) or len(pair) != 2:
                    raise InputError(f"{rows.where}: history in {rows.at(place)} is no list of pairs: {rows.remedy}")
                earlier += [
                    {"role": role, "content": each} for role, each in zip(("user", "assistant"), pair, strict=True)
                ]
            asked = f"{asked}\n\n{more}" if more else str(asked)
            first = [{"role": "system", "content": system}] if system else []
            yield (
                [*first, *earlier, {"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}],
                None,
            )


_NONE: tuple[Any, ...] = (None, "", "[]", [])
"""Cells without a list."""


def table_of(conversations: Iterable[Conversation]) -> "pa.Table":
    """`source`, the turns before the last answer as a text; `opening`, those before the first answer as JSON;
    `conversation`, all as JSON; `where`, file and row.

    Rows are grouped by `opening`, since a file may have a conversation and a longer one that begins with it.
    """
    pa = need("pyarrow", "bench")
    columns: dict[str, list[str]] = {"source": [], "opening": [], "conversation": [], "where": []}
    for each in conversations:
        source = [f"{message['role']}: {message['content']}" for message in each.messages[:-1]]
        columns["source"].append("\n".join([*source, *([json.dumps(each.tools)] if each.tools else [])]))
        opening = itertools.takewhile(lambda message: message["role"] != "assistant", each.messages)
        columns["opening"].append(json.dumps([*opening]))
        columns["conversation"].append(json.dumps([each.messages, each.tools, each.learnt], ensure_ascii=False))
        columns["where"].append(each.where)
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _conversation(text: str, where: str) -> Conversation:
    messages, tools, learnt = json.loads(text)
    return Conversation(messages, where, tools, learnt)


def _listed(value: Any, where: str, what: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: {what} is no list, nor one in JSON: {value[:40]!r}") from None
    else:
        value = _without_nulls(value)
    if not isinstance(value, list):
        raise InputError(f"{where}: {what} is no list but {type(value).__name__}")
    if not value:
        raise InputError(f"{where}: {what} is an empty list")
    return value


def _without_nulls(value: Any) -> Any:
    """Without keys that are null, and that a row may not have had: a column has one type for all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _checked(turns: list[Any], where: str, style: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """Turns with role and content, in an order that can be, and whether each is learnt.

    `style` is the key that has the roles of the file. InputError for whatever is wrong.
    """
    messages: list[dict[str, Any]] = []
    learnt, before, content_key = [], "", "content" if style == "role" else "value"

    def wrong(reason: str) -> NoReturn:
        raise InputError(f"{where}, turn {len(messages) + 1}: {reason}")

    for turn in turns:
        turn = {key: each for key, each in turn.items() if each is not None} if isinstance(turn, dict) else {}
        if not {"role", "from"} & turn.keys():
            wrong("it has neither role and content nor from and value")
        if style not in turn or {"role", "from"} <= turn.keys():
            wrong("role and content are mixed with from and value in one file; use one of them")
        if "function_call" in turn:
            wrong("function_call is not read; use tool_calls")
        if turn.get(style) == "function_call":
            turn = {style: "gpt", "tool_calls": [{"type": "function", "function": turn.get(content_key)}]}
        role = ROLES.get(str(turn[style]), turn[style])
        if not isinstance(role, str) or role not in AFTER:
            wrong(f"no role is called {role!r}{nearest(str(role), AFTER)}; known: {', '.join((*AFTER, *ROLES))}")
        if before not in AFTER[role]:
            wrong(f"the role {role} cannot come {f'after {before}' if before else 'first'}")
        content = _text(turn.get(content_key, ""))
        given = turn.get("tool_calls", []) if role == "assistant" else []
        calls = [_call(each) for each in given] if isinstance(given, list) else [None]
        if content is None or None in calls:
            wrong("its content is no text" if content is None else "its tool_calls are not those of functions")
        if not content.strip() and role in ("user", "assistant") and not calls:
            wrong(f"the {'answer' if role == 'assistant' else 'content'} is empty")
        for key in WEIGHTS:
            if turn.get(key, 1) not in (0, 1):
                wrong(f"{key} is {turn[key]}, not 0 or 1")
        more = {key: each for key, each in turn.items() if key not in (style, content_key, "tool_calls", *WEIGHTS)}
        messages.append({**more, "role": role, "content": content, **({"tool_calls": calls} if calls else {})})
        learnt.append(role == "assistant" and all(turn.get(key, 1) for key in WEIGHTS))
        before = role
    if not any(learnt):
        raise InputError(f"{where}: no turn of the assistant is there to be learnt")
    if before != "assistant":
        raise InputError(f"{where}: the last turn is of the role {before}, and no answer follows; leave it out")
    return messages, learnt


def _text(content: Any) -> str | None:
    """A text, or the joined texts of a list of parts; None for anything else, such as a picture."""
    if isinstance(content, list):
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else None for part in content]
        texts = all(isinstance(part, str) for part in parts) and all(part.get("type") == "text" for part in content)
        content = "".join(map(str, parts)) if texts else None
    return content if isinstance(content, str) else None


def _call(call: Any) -> dict[str, Any] | None:
    """A call with its arguments as a mapping, which templates expect and OpenAI's files have as JSON; None for none."""
    function = _parsed(call.get("function")) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = _parsed(function.get("arguments")) or {}
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else None


def _parsed(value: Any) -> Any:
    """What a text has as JSON, if it has that."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _note(cuts: Counter[str], total: int, limit: str = "max_length") -> str:
    """How many rows are longer than the limit, and what becomes of them; "" for none."""
    parts = [f"{cuts[where]:,} are {where}" for where in (AT_TURN, IN_ANSWER, LEFT_OUT) if cuts[where]]
    return f"{limit}: of {total:,} rows, {', '.join(parts)}" if parts else ""
