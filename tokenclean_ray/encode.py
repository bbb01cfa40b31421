"""Chat messages → token ids and response mask, by the character offsets of one tokenization of the whole text.

A response is what the model would have to produce: the assistant's text with the token that ends its turn. A token
that straddles the border into an answer counts as response; the template's newline after the turn does not.

Where the template has `{% generation %}` markers, they say where answers are. Else an answer starts where the
template's generation prompt ends, and ends after the first end-of-turn token that follows.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from tokenclean_ray.config import UserError
from tokenclean_ray.formats import Message, to_messages
from tokenclean_ray.source import RowError

# The paper's format. The last turn ends without a newline, as the reference scripts strip the text.
TULU = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '' if loop.last else '\\n' }}{% endfor %}"
    "{{ '\\n<|assistant|>\\n' if add_generation_prompt }}"
)
TODAY = datetime(2024, 7, 26)  # what Llama 3's templates write where they know no date
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a header may hold beside special tokens and still open a turn: <|user|>, [INST], <<SYS>>
BRACKETED = re.compile(r"<\S+?>+|\[\S+?\]")
NEVER = "(?!)"  # matches nothing
WAY_OUT = "add {% generation %} markers to the template, or set data.template: tulu"
PROBE = ["qzplum", "qzpear", "qzfig", "qzlime"]  # plain words, which no template rewrites

Span = tuple[int, int]
Tokens = tuple[np.ndarray, np.ndarray]
"""input_ids (int32) and response_mask (bool), of the same length."""


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into tokens. Built by `build_encoder`, which proves that the template can be followed."""

    tokenizer: Any
    template: str
    add_special_tokens: bool
    max_length: int
    on_overflow: str
    enders: tuple[str, ...]
    """Special tokens that end an assistant's turn."""
    markers: tuple[str, ...]
    """Texts that must not stand in content: special tokens, and what the template opens turns with."""

    def render(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The conversation's text and the character spans of its answers.

        Raises:
            RowError: the content holds the template's markers, or the template refuses or rewrites the conversation.
        """
        self._refuse_markers([messages, tools])
        text, spans = (self._locate_calls if _arguments(messages) else self._locate)(messages, tools)
        answers = "".join(text[start:end] for start, end in spans)
        for name in _called(messages):
            if name not in answers:
                raise RowError("the chat template leaves out a tool call", name)
        return text, spans

    def _locate_calls(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """With the arguments of tool calls as objects or, for templates that want them so, as JSON text."""
        with contextlib.suppress(RowError):
            text, spans = self._locate(messages, tools)
            if not any(str(given) in text and str(given) != _as_json(given) for given in _arguments(messages)):
                return text, spans  # else they stand there as Python writes them
        return self._locate(_with_written_arguments(messages), tools)

    def _locate(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        text, generated = self._apply(messages, tools, generation=bool(GENERATION.search(self.template)))
        if generated:
            return text, [self._end_at_turn(text, start, end) for start, end in generated]
        return text, list(self._spans_by_prefix(text, messages, tools))

    def encode(self, texts: list[str], spans: list[list[Span]]) -> list[Tokens | RowError]:
        """Tokens of many conversations, tokenized in one call.

        Returns:
            per text `input_ids` (int32) and `response_mask` (bool) of the same length, or why there are none.
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=self.add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            self._mask(np.array(ids, np.int32), np.fromiter(chain.from_iterable(offsets), np.int64), row_spans)
            for ids, offsets, row_spans in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        ]

    def encode_rows(
        self, rows: Iterable[dict[str, Any] | RowError], format: str, columns: dict[str, str]
    ) -> list[Tokens | RowError]:
        """Raw rows as tokens, or why there are none; `format` and `columns` as of `formats.to_messages`."""
        texts, spans = [], []
        found: list[RowError | None] = []
        for row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                text, row_spans = self.render(*to_messages(row, format, columns))
            except RowError as error:
                found.append(error)
                continue
            texts.append(text)
            spans.append(row_spans)
            found.append(None)
        encoded = iter(self.encode(texts, spans))
        return [next(encoded) if error is None else error for error in found]

    def _mask(self, ids: np.ndarray, borders: np.ndarray, spans: list[Span]) -> Tokens | RowError:
        """`borders`: where each token begins and ends, one after another."""
        if len(ids) > self.max_length and self.on_overflow == "reject":
            return RowError("longer than data.max_length", f"{len(ids)} tokens")
        begin, end = borders[: 2 * self.max_length].reshape(-1, 2).T
        mask = np.zeros(len(begin), bool)
        for start, stop in spans:
            mask |= (begin < stop) & (end > start)
        mask[:1] = False  # nothing precedes a first token, so it has no loss
        if not mask.any():
            return RowError("no response token within data.max_length", f"{len(ids)} tokens")
        return ids[: self.max_length], mask

    def _apply(
        self, messages: list[Message], tools: list[Any] | None, *, generation: bool = False, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=generation,
                add_generation_prompt=prompt,
                strftime_now=TODAY.strftime,  # else tokens would depend on the day
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowError("the chat template refuses the conversation", str(error)) from error
        return texts[0], [tuple(span) for span in spans[0]] if generation else []

    def _end_at_turn(self, text: str, start: int, end: int) -> Span:
        """A marked span made to end right after its end-of-turn token, whether the markers enclose it or not."""
        inside = [text.rfind(e, start, end) + len(e) for e in self.enders if e in text[start:end]]
        if inside:
            return start, max(inside)
        rest = text[end:].lstrip()
        for ender in self.enders:
            if rest.startswith(ender):
                return start, len(text) - len(rest) + len(ender)
        return start, start + len(text[start:end].rstrip())

    def _spans_by_prefix(self, text: str, messages: list[Message], tools: list[Any] | None) -> Iterator[Span]:
        unfollowed = f"the chat template cannot be followed ({WAY_OUT})"
        end, after = 0, 0  # of the last answer: its end in the text, and the turn that follows it
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._apply(messages[:number], tools, prompt=True)
            if not text.startswith(before):
                raise RowError(unfollowed, f"it renders what precedes turn {number + 1} differently in its context")
            start = len(before)
            # an answer that ran past its end would swallow the turns between
            if start < end or not all(_says(text[end:start], asked) for asked in messages[after:number]):
                raise RowError(unfollowed, f"the end of the answer before turn {number + 1} is not found")
            ends = [text.find(e, start) + len(e) for e in self.enders if e in text[start:]]
            if not ends:
                raise RowError(unfollowed, f"no end-of-turn token after turn {number + 1}")
            end, after = min(ends), number + 1
            # some templates write thoughts as a turn of their own, before the answer
            said = message["content"].rpartition("</think>")[2].strip()
            if said not in text[start:end] and said in text[end:]:
                raise RowError(unfollowed, f"turn {number + 1} goes on after its first end-of-turn token")
            yield start, end
        if not all(_says(text[end:], asked) for asked in messages[after:]):
            raise RowError(unfollowed, "the end of the last answer is not found")

    def _refuse_markers(self, value: Any) -> None:
        for string in _strings(value):
            try:
                string.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowError("lone surrogate in text", str(error)) from error
            for form in _forms(self.tokenizer, string):
                if found := self._any_marker.search(form):
                    raise RowError("special-token or template text in the content", repr(found[0]))

    @cached_property
    def _any_marker(self) -> re.Pattern[str]:
        """One pass for all markers, since Llama 3 has 256: 40 times as fast as one after another."""
        longest_first = sorted(self.markers, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or NEVER)


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for key, inner in value.items():
                yield from _strings(key)
                yield from _strings(inner)
        case list() | tuple():
            for inner in value:
                yield from _strings(inner)
        case _:
            yield str(value)  # bytes and the like, as a template would write them


def _forms(tokenizer: Any, text: str) -> list[str]:
    """A text as it is, and as the tokenizer sees it: ＜s＞ may become <s>, <S> too."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return [text] if normalizer is None else [text, normalizer.normalize_str(text)]


def _says(text: str, message: Message) -> bool:
    """Whether a text holds a turn's content, as it is or as JSON, which Llama 3 makes of a tool's."""
    content = message["content"].strip()
    return content in text or _as_json(content)[1:-1] in text


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls(messages: list[Message]) -> Iterator[dict[str, Any]]:
    """The functions that the answers call, with their arguments."""
    for message in messages:
        for call in message.get("tool_calls") or () if message["role"] == "assistant" else ():
            yield call["function"] if isinstance(call.get("function"), dict) else call


def _arguments(messages: list[Message]) -> list[dict[str, Any]]:
    """What the answers call functions with, where it is no text and not empty."""
    return [
        call["arguments"] for call in _calls(messages) if call.get("arguments") and isinstance(call["arguments"], dict)
    ]


def _with_written_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text."""
    written: list[Message] = copy.deepcopy(messages)
    for call in _calls(written):
        if isinstance(call.get("arguments"), dict):
            call["arguments"] = _as_json(call["arguments"])
    return written


def _called(messages: list[Message]) -> Iterator[str]:
    """The names of the functions that the answers call."""
    yield from (call["name"] for call in _calls(messages) if isinstance(call.get("name"), str))


def build_encoder(tokenizer: Any, template: str, max_length: int, on_overflow: str) -> Encoder:
    """An encoder for a tokenizer and `data.template`.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: chat (the tokenizer's own) or tulu.

    Raises:
        UserError: no offsets, no chat template, no end-of-sequence token, or a template that offsets cannot follow.
    """
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} gives no character offsets: convert it to a fast one")
    jinja = TULU if template == "tulu" else tokenizer.chat_template
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if not jinja:
        raise UserError(f"the tokenizer of {name} has no chat template: set data.template: tulu")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no eos_token: set one in its tokenizer_config.json")
    specials = {str(t) for t in tokenizer.all_special_tokens}
    specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    settings = (tokenizer, jinja, template == "tulu", max_length, on_overflow)
    try:
        enders = {tokenizer.eos_token, _end_of_turn(Encoder(*settings, (), ()), specials)} | ({"<|eom_id|>"} & specials)
        ordered = tuple(sorted(enders))
        written = specials | _turn_markers(Encoder(*settings, ordered, ()), specials)
        markers = {form for marker in written for form in _forms(tokenizer, marker)} - {""}
        encoder = Encoder(*settings, ordered, tuple(sorted(markers)))
        conversation = _probe()
        text, spans = encoder.render(conversation, None)
        answers = [m["content"] for m in conversation if m["role"] == "assistant"]
        if [a in text[s:e] for a, (s, e) in zip(answers, spans, strict=True)] != [True, True]:
            raise RowError("the answers are not where the template says", repr(text))
    except (RowError, ValueError) as error:
        detail = f"{error.reason}; {error.detail}" if isinstance(error, RowError) else str(error)
        raise UserError(f"the chat template of {name} cannot be followed ({detail}): {WAY_OUT}") from error
    return encoder


def _probe() -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(PROBE)]


def _end_of_turn(draft: Encoder, specials: set[str]) -> str:
    """The special token that follows an answer."""
    text, _ = draft._apply(_probe(), None)
    after = text[text.index(PROBE[1]) + len(PROBE[1]) :].lstrip()
    token = max((s for s in specials if after.startswith(s)), key=len, default=None)
    if token is None:
        raise RowError("no special token follows an answer", repr(after[:40]))
    return token


def _turn_markers(draft: Encoder, specials: set[str]) -> set[str]:
    """Plain texts that the template opens and ends turns with; special tokens are refused in any case."""
    system, tool = ({"role": role, "content": f"qz{role}"} for role in ("system", "tool"))
    rendered = [draft._locate(_probe(), None)]
    for conversation in ([system, *_probe()], [*_probe(), tool]):
        with contextlib.suppress(RowError):  # templates that take no such turn
            rendered.append(draft._locate(conversation, None))
    return {marker for text, spans in rendered for marker in _markers_in(text, spans, specials)}


def _markers_in(text: str, spans: list[Span], specials: set[str]) -> Iterator[str]:
    for start, end in reversed(spans):  # what the template adds within an answer, such as <think>, opens no turn
        text = text[:start] + PROBE[1] + text[end:]
    special = re.compile("|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)))
    for header in re.split("|".join(["qzsystem", "qztool", *PROBE]), text):
        found = BRACKETED.findall(special.sub(" ", header))
        # a header of plain words (### Response:, USER:) is a marker as a whole; beside a special token it is harmless
        line = header.strip().rpartition("\n")[2]
        if re.search(r"\w", line) and not found and not special.search(line):  # not the quotes of a tool's JSON
            found = [line]
        yield from found


def encoding_fingerprint(encoder: Encoder, data: dict[str, Any]) -> str:
    """What decides how a row becomes tokens, as text: enters the parts' names.

    Args:
        data: the settings of the config's data section that matter for it.
    """
    settings = {
        "version": 3,  # raise it when the meaning of encoded/ changes
        "tokenizer": json.loads(encoder.tokenizer.backend_tokenizer.to_str()),
        "special_tokens": {k: str(v) for k, v in encoder.tokenizer.special_tokens_map.items()},
        "template": encoder.template,
        **data,
    }
    return json.dumps(settings, sort_keys=True)
