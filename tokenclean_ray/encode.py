"""Chat messages → token ids and response mask, by the character offsets of one tokenization of the whole text.

A response is what the model would have to produce: the assistant's text with the token that ends its turn. A token
that straddles the border into an answer counts as response; the template's newline after the turn does not.

Where the template has `{% generation %}` markers, they say where answers are. Else an answer starts where the
template's generation prompt ends, or where another answer in its place would start; it ends after the first
end-of-turn token that follows its content.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import chain, count, dropwhile
from string import ascii_letters
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from tokenclean_ray.formats import Message, TurnKeys, to_messages
from tokenclean_ray.json_text import as_json
from tokenclean_ray.schema import Raw, RowError
from tokenclean_ray.tool_calls import functions_called, with_written_arguments

TODAY = datetime(2024, 7, 26)  # what Llama 3's templates write where they know no date
# in place of transformers' own function, else tokens would depend on the day; new ones let no function in from outside
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}{% for code, text in "
    + str([(code, TODAY.strftime(code)) for letter in ascii_letters for code in (f"%{letter}", f"%-{letter}")])
    + " %}{% set now.text = now.text | replace(code, text) %}{% endfor %}{{ now.text }}{% endmacro %}"
    + "\n"  # which is trimmed, so that the template still begins a line
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PART_OF_TAG = re.compile(r"<[^<>\s]*\Z")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a turn, of which each template knows one
NEVER = "(?!)"  # matches nothing
OF_RENDERING = inspect.signature(render_jinja_template).parameters.keys() | {"messages"}
WAY_OUT = "add {% generation %} markers to the template, or set data.template: tulu"
UNFOLLOWED = f"the chat template cannot be followed ({WAY_OUT})"

Span = tuple[int, int]
Tokens = tuple[np.ndarray, np.ndarray]
"""input_ids (int32) and response_mask (bool), of the same length."""


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into tokens. `chat_template.build_encoder` builds it, and proves that its template can be
    followed."""

    tokenizer: Any
    template: str
    add_special_tokens: bool
    max_length: int
    on_overflow: str
    enders: tuple[str, ...]
    """Special tokens that end an assistant's turn."""
    markers: tuple[str, ...]
    """Texts that must not stand in content: special tokens, and what the template opens turns with."""
    prompt: str
    """What the generation prompt adds to a question."""
    written_arguments: bool
    """Whether the template wants the arguments of tool calls as JSON text."""
    writes_tools: bool
    """Whether the template writes the definitions of tools."""
    for_tools: "Encoder | None" = None
    """What rows with tools are encoded by, where the tokenizer has a template of its own for them."""
    given: dict[str, Any] = field(default_factory=dict)
    """What a row gives the template beside its messages, as enable_thinking."""

    def render(
        self, messages: list[Message], tools: list[Any] | None, given: dict[str, Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The conversation's text and the character spans of its answers, those of weight 0 left out.

        Raises:
            RowError: the content holds the template's markers, or the template refuses or rewrites the conversation.
        """
        if tools and self.for_tools:
            return self.for_tools.render(messages, tools, given)
        if given:
            if ours := given.keys() & OF_RENDERING:
                raise RowError("chat_template_kwargs says what the row may not", ", ".join(sorted(ours)))
            self._refuse_markers(given)
            return replace(self, given=given).render(messages, tools)
        trained = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        messages = [{key: value for key, value in turn.items() if key != "weight"} for turn in messages]
        self._refuse_markers([messages, tools])
        if tools and not self.writes_tools:
            raise RowError("the chat template leaves out the tools (data.columns: {tools: none} does without)")
        text, spans = self.locate(with_written_arguments(messages) if self.written_arguments else messages, tools)
        if messages[-1]["role"] == "assistant" and trained[-1]:
            _refuse_lost_thoughts(text, messages[-1])
        if all(trained):
            return text, spans
        if len(spans) != len(trained):
            raise RowError(UNFOLLOWED, "answers that are not trained on touch others")
        return text, [span for span, weight in zip(spans, trained, strict=True) if weight]

    def locate(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """As `render`, of content that is known to be harmless, and arguments as the template wants them."""
        text, generated = self.apply(messages, tools, generation=bool(GENERATION.search(self.template)))
        if not generated:
            return text, list(self._find_answers(text, messages, tools))
        for number, message in enumerate(messages):  # markers say where answers are, not what they leave out
            if message.get("tool_calls"):
                self._around(messages, tools, number)
            elif not _says(text, message["content"].rpartition("</think>")[2]):
                raise RowError("the chat template leaves out a turn", f"turn {number + 1}")
        return text, [self._end_at_turn(text, start, end) for start, end in _joined(generated)]

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

    def cut_short(self, full: int, rows: int) -> str:
        """How many of some rows are of `max_length`, where longer ones are cut; empty where none is, or may be cut."""
        if not full or self.on_overflow == "reject":
            return ""
        return f"{full:,} of {rows:,} rows reach data.max_length = {self.max_length}, where longer ones are cut"

    def encode_rows(
        self, rows: Iterable[Raw], format: str, columns: dict[str, str], turn_keys: TurnKeys | None = None
    ) -> list[Tokens | RowError]:
        """Raw rows as tokens, or why there are none; what else is given as of `formats.to_messages`."""
        texts, spans = [], []
        found: list[RowError | None] = []
        for row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                text, row_spans = self.render(*to_messages(row, format, columns, turn_keys))
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

    def apply(
        self, messages: list[Message], tools: list[Any] | None, *, generation: bool = False, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text as the template writes it, and the spans that it marks."""
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._dated,
                return_assistant_tokens_mask=generation,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
                **self.given,
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

    def _find_answers(self, text: str, messages: list[Message], tools: list[Any] | None) -> Iterator[Span]:
        before, after = 0, 0  # the end of the last answer in the text, and the turn that follows it
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._find_answer(text, messages, tools, number, before)
            # an answer that ran past its end would swallow the turns between; Mistral writes the system's elsewhere
            asked = [(text if m["role"] == "system" else text[before:start], m) for m in messages[after:number]]
            if start < before or not all(_says(part, question["content"]) for part, question in asked):
                raise RowError(UNFOLLOWED, f"before turn {number + 1}, a turn is left out or an answer has no end")
            if end is None:
                raise RowError(UNFOLLOWED, f"no end-of-turn token after turn {number + 1}, so no model learns to stop")
            if not _says(text[start:end], message["content"].rpartition("</think>")[2]):
                raise RowError(UNFOLLOWED, f"what it writes of turn {number + 1} is not what the turn says")
            before, after = end, number + 1
            yield start, end
        if not all(_says(text[before:], asked["content"]) for asked in messages[after:]):
            raise RowError(UNFOLLOWED, "the last answer has no end, or a turn after it is left out")

    def _find_answer(
        self, text: str, messages: list[Message], tools: list[Any] | None, number: int, after: int
    ) -> tuple[int, int | None]:
        """Where a turn's answer starts, somewhere `after`, and where it ends, if it does.

        It starts after the generation prompt. Where that is another text in a conversation (it opens a thought, or the
        system's turn comes before the last question) it starts where another answer would make a difference.
        """
        turn, start = messages[number], None
        if number > 0 and messages[number - 1]["role"] in ("user", "tool"):  # after others some write no prompt
            prompted, _ = self.apply(messages[:number], tools, prompt=True)
            if text.startswith(prompted):
                start = len(prompted)
                if turn.keys() == {"role", "content"}:
                    return start, self._end(text, start)
        before, rest = self._around(messages, tools, number)
        if start is None:
            start = _parting(text, before)
            if self.prompt and (at := text.rfind(self.prompt, after, start)) >= 0:
                start = at + len(self.prompt)  # gpt-oss's ends before the channel, which is the model's choice
            elif turn.get("tool_calls"):  # what precedes a call is written for another call too
                said, later = {"role": "assistant", "content": "said"}, messages[number + 1 :]
                try:
                    before, _ = self._around([*messages[:number], said, *later], tools, number)
                except RowError:  # results of tools are left, which nothing called
                    later = list(dropwhile(lambda message: message["role"] != "user", later))
                    before, _ = self._around([*messages[:number], said, *later], tools, number)
                start = min(start, _parting(text, before))
        # thoughts, calls and answers may be turns of their own, all of which the model produces
        return start, self._end(text, max(start, len(text) - _shared(text[::-1], rest[::-1])))

    def _around(self, messages: list[Message], tools: list[Any] | None, number: int) -> tuple[str, str]:
        """The text before and after the words of a turn that says something else, and calls its tools with it.

        Raises:
            RowError: the template leaves out what is said, or a call.
        """
        used = str((messages, tools))
        other = next(word for word in (f"qz{n}z" for n in count()) if word not in used)
        words = {f"{other}said": ("what is said", "")} if messages[number]["content"].strip() else {}
        turn: Message = {"role": "assistant", "content": "".join(words)}
        if messages[number].get("tool_calls"):
            turn["tool_calls"] = [copy.deepcopy(call) for call in messages[number]["tool_calls"]]
        for place, call in enumerate(functions_called([turn])):
            word = f"{other}given{place}z"
            words[word] = ("a tool call", f"{call.get('name')}, ")
            call["arguments"] = as_json({word: word}) if self.written_arguments else {word: word}
        text, _ = self.apply([*messages[:number], turn, *messages[number + 1 :]], tools)
        for word, (what, name) in words.items():
            if word not in text:
                raise RowError(f"the chat template leaves out {what}", f"{name}turn {number + 1}")
        return text[: min(map(text.find, words))], text[max(text.rfind(word) + len(word) for word in words) :]

    def _end(self, text: str, at: int) -> int | None:
        """Where the first end-of-turn token ends that goes beyond a place."""
        found = ((text.find(ender, max(0, at - len(ender) + 1)), ender) for ender in self.enders)
        return min((begin + len(ender) for begin, ender in found if begin >= 0), default=None)

    def _refuse_markers(self, value: Any) -> None:
        for string in _strings(value):
            try:
                string.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowError("lone surrogate in text", str(error)) from error
            for form in forms(self.tokenizer, string):
                if found := self._any_marker.search(form):
                    raise RowError("special-token or template text in the content", repr(found[0]))

    @cached_property
    def _dated(self) -> str:
        return STRFTIME_NOW + self.template

    @cached_property
    def _any_marker(self) -> re.Pattern[str]:
        return any_of(self.markers)


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that touch as one: some templates mark the last end-of-sequence token apart."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


@lru_cache(8)  # a row that gives its template something has an encoder of its own, and Gemma has 6,000 special tokens
def any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """One pass for all, since Llama 3 has 256 special tokens: 40 times as fast as one after another."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or NEVER)


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


def forms(tokenizer: Any, text: str) -> list[str]:
    """A text as it is, and as the tokenizer sees it: ＜s＞ may become <s>, <S> too."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return [text] if normalizer is None else [text, normalizer.normalize_str(text)]


def _says(text: str, content: str) -> bool:
    """Whether a text holds a turn's content, as it is or as JSON, which Llama 3 makes of a tool's."""
    content = content.strip()
    return content in text or as_json(content)[1:-1] in text


def _refuse_lost_thoughts(text: str, answer: Message) -> None:
    """Of the last answer: of earlier ones many templates leave out thoughts on purpose."""
    lost = "the chat template leaves out the last answer's"
    if not _says(text, answer["content"].rpartition("</think>")[0].strip().removeprefix("<think>")):
        raise RowError(f"{lost} thoughts", "without them it can be trained on")
    for key in THOUGHTS:
        if isinstance(answer.get(key), str) and not _says(text, answer[key]):
            raise RowError(f"{lost} {key} (data.turn_keys: {{{key}: null}} trains without)")


def _shared(text: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    least, most = 0, min(len(text), len(other))
    while least < most:  # by halves: comparing slices is fast, characters are not
        middle = (least + most + 1) // 2
        if text[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _parting(text: str, other: str) -> int:
    """Where a text becomes another than one that it may begin with; before a tag of which only a part is shared."""
    shared = _shared(text, other)
    return shared if shared == len(other) else len(PART_OF_TAG.sub("", text[:shared]))


def encoding_fingerprint(encoder: Encoder, data: dict[str, Any]) -> str:
    """What decides how a row becomes tokens, as text: enters the parts' names.

    Args:
        data: the settings of the config's data section that matter for it.
    """
    settings = {
        "version": 9,  # raise it when the meaning of encoded/ changes
        "tokenizer": json.loads(encoder.tokenizer.backend_tokenizer.to_str()),
        "special_tokens": {k: str(v) for k, v in encoder.tokenizer.special_tokens_map.items()},
        "template": encoder.template,
        **({"add_special_tokens": True} if encoder.add_special_tokens else {}),
        **({"tool_use": encoder.for_tools.template} if encoder.for_tools else {}),
        **data,
    }
    return json.dumps(settings, sort_keys=True)
