"""Conversations as tokens, by a model's chat template, and which tokens are the assistant's.

Templates do not say which part of their text is an answer. So a conversation is written several times: up to each turn
of the assistant with the template's prompt for one (`add_generation_prompt`), up to the end of that turn, and whole.
What the second has after the first is the answer, with the token that ends the turn. This only holds if each text is
how the next one starts; a template that writes earlier turns differently later on is refused.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rankwise.errors import InputError

CHATML = (
    "{{ begin }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + end + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What a tokenizer without a template gets; where it has no <|im_end|> its own end token ends a turn."""
TODAY = datetime.date(2024, 7, 26)
"""The date for templates that write today's, or rows would differ from day to day; Llama 3.1 has it without a clock."""


@dataclass(frozen=True)
class Conversation:
    """Turns of one conversation, as templates take them.

    Attributes:
        messages: with `role` and `content`, the last one of the assistant.
        where: file and row, for messages.
        tools: what the assistant may call.
        learnt: of each turn whether it is learnt, if it is the assistant's.
    """

    messages: list[dict[str, Any]]
    where: str
    tools: list[Any] | None = None
    learnt: Sequence[bool] = ()


class Answer(NamedTuple):
    """The tokens of one turn of the assistant: from `start` to before `stop`."""

    start: int
    stop: int


def own(file: str) -> str:
    """The text of a template's file. InputError if it cannot be read."""
    try:
        return Path(file).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"template: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"template: {file} is not text in UTF-8") from None


@dataclass(frozen=True)
class Template:
    """A chat template with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    """Jinja; empty for the tokenizer's own."""
    name: str
    """In messages."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str, file: str) -> "Template":
        """The template `text` of `file` if there is one, else the tokenizer's, else CHATML."""
        if text:
            return cls(tokenizer, text, f"the template {file}")
        if tokenizer.chat_template is not None:
            return cls(tokenizer, "", "the tokenizer's chat template")
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        end = "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token"
        text = CHATML.replace("{{ begin }}", "{{ bos_token }}" if begins else "").replace(" end ", f" {end} ")
        return cls(tokenizer, text, "ChatML")

    def encode(self, conversations: Sequence[Conversation]) -> Iterator[tuple[list[int], list[Answer]]]:
        """Of each conversation its tokens, and the turns that are learnt.

        InputError, with file and row, for a conversation that the template does not take as it is.
        """
        written = [self._texts(each) for each in conversations]
        pieces = [[whole[start:end] for start, end in itertools.pairwise(ends)] for whole, ends in written]
        texts = dict.fromkeys(itertools.chain((whole for whole, _ in written), *pieces))
        tokens = dict(zip(texts, self._tokens([*texts]), strict=True))
        for (whole, ends), parts in zip(written, pieces, strict=True):
            ids, joined = tokens[whole], [*itertools.chain(*(tokens[part] for part in parts))]
            stops = [*itertools.accumulate(len(tokens[part]) for part in parts[:-1])]
            if ids != joined:
                ids, stops = self._across(whole, ends, ids, joined, stops)
            yield ids, [Answer(*pair) for pair in zip(stops[::2], stops[1::2], strict=True)]

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The tokens of each conversation, whose last turn asks, up to where the assistant answers."""
        return self._tokens([self._write(each, len(each.messages), prompt=True) for each in conversations])

    def example(self) -> list[int]:
        """The tokens of an answer, with the one that ends it."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [(ids, [answer])] = self.encode([Conversation(turns, "a conversation of two turns")])
        return ids[answer.start : answer.stop]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(  # without what the tokenizer would add: the template has written it
            texts, add_special_tokens=False, verbose=False
        )["input_ids"]
        return ids

    def _across(
        self, whole: str, ends: list[int], ids: list[int], joined: list[int], stops: list[int]
    ) -> tuple[list[int], list[int]]:
        """The tokens of `whole`, and how many are before each end, where they are not `joined`, those of its pieces.

        They are those of the whole, if what it begins with has the same tokens alone, up to each end; a model that is
        to answer reads that. Else a token is on both sides of an end, and they are `joined`; unless the tokenizer reads
        something else at the start of a piece, as those of Llama 2 do, and such a token belongs to what comes after.
        """
        starts = self._tokens([whole[:end] for end in ends[1:-1]])
        alike = all(start == ids[: len(start)] for start in starts)
        if not alike and self.tokenizer.decode(joined) == self.tokenizer.decode(ids):
            return joined, stops
        return ids, [_shared(start, ids) for start in starts]

    def _texts(self, conversation: Conversation) -> tuple[str, list[int]]:
        """The whole conversation, and where it is cut: at 0, where each learnt answer starts and ends, and its end."""
        messages, where = conversation.messages, conversation.where
        whole, ends = self._write(conversation, len(messages)), [0]
        if conversation.tools and whole == self._write(conversation, len(messages), tools=False):
            raise InputError(f"{where}: {self.name} leaves out the tools: {_REMEDY}")
        self._check_order(conversation, whole)
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or not (conversation.learnt or [True] * len(messages))[place]:
                continue
            prompt, turn = self._write(conversation, place, prompt=True), self._write(conversation, place + 1)
            if not whole.startswith(turn):  # Phi-3's template ends each text with the end token, whatever comes before
                turn = turn.removesuffix(str(self.tokenizer.eos_token))
            if not turn.startswith(prompt) or not whole.startswith(turn):
                raise InputError(
                    f"{where}: {self.name} writes turn {place + 1} differently "
                    + ("after its prompt" if whole.startswith(turn) else "once others follow")
                    + ", so that its tokens cannot be told from the others: put weight: 0 into the turn, or give a "
                    "template of your own (template: FILE)"
                )
            text = message["content"].strip()
            ending = turn[len(prompt) :].partition(text)[2] if text else turn[len(prompt) :]
            closing = [end for end in self._ends if end in ending]
            if not closing:
                raise InputError(
                    f"{where}: {self.name} ends turn {place + 1} without a special token, so that a model would not "
                    f"learn to stop: {_REMEDY}"
                )
            for number, each in enumerate(messages, 1):
                if spelt := [end for end in closing if end in each["content"]]:
                    raise InputError(f"{where}: turn {number} holds {spelt[0]!r}, which ends a turn: remove it")
            ends += [len(prompt), len(turn)]
        return whole, [*ends, len(whole)]

    def _check_order(self, conversation: Conversation, whole: str) -> None:
        """InputError if the template does not write the content of each turn, one after another."""
        place = 0
        for turn, message in enumerate(conversation.messages, 1):
            calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
            for text in (message["content"].strip(), *calls):
                forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
                places = {form: whole.find(form, place) for form in forms}
                form, found = next(((form, at) for form, at in places.items() if at >= 0), ("", -1))
                if found < 0:
                    raise InputError(
                        f"{conversation.where}: {self.name} leaves out or changes turn {turn}, of the role "
                        f"{message['role']}: {_REMEDY}"
                    )
                place = found + len(form)

    @cached_property
    def _ends(self) -> list[str]:
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return sorted(token for token in added.union(self.tokenizer.all_special_tokens) if token.strip())

    def _write(self, conversation: Conversation, count: int, prompt: bool = False, tools: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation.messages[:count],
                    tools=conversation.tools if tools else None,
                    chat_template=_dated(self.text or self.tokenizer.get_chat_template(tools=conversation.tools)),
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{conversation.where}: {self.name} does not take this conversation: {reason}") from error


_REMEDY = "correct the row, or give a template of your own (template: FILE)"


@functools.cache
def _dated(text: str) -> str:
    """A template with TODAY in place of the day's date."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(TODAY.strftime(call[2])), text)


def _shared(part: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens the two begin with: a token across the end of `part` is not one of them."""
    if part == whole[: len(part)]:
        return len(part)
    pairs = enumerate(zip(part, whole, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(whole))
