"""What a chat template does, found by rendering conversations of plain words: what ends turns, what opens them.

Input: a tokenizer and `data.template`. Output: an `Encoder`, or why there can be none.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tokenclean_ray.encode import UNFOLLOWED, WAY_OUT, Encoder, Span, any_of, forms
from tokenclean_ray.errors import UserError
from tokenclean_ray.formats import Message
from tokenclean_ray.schema import RowError
from tokenclean_ray.tool_calls import with_written_arguments

# The paper's format. The last turn ends without a newline, as the reference scripts strip the text.
TULU = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '' if loop.last else '\\n' }}{% endfor %}"
    "{{ '\\n<|assistant|>\\n' if add_generation_prompt }}"
)
# What a header may hold beside special tokens and still open a turn: <|user|>, [INST], <<SYS>>
BRACKETED = re.compile(r"<\S+?>+|\[\S+?\]")
THOUGHTS = re.compile(r"</?think>")  # in headers too, yet they open no turn, and answers of reasoning models hold them
PROBE = ["qzplum", "qzpear", "qzfig", "qzlime"]  # plain words, which no template rewrites
CALLED = ["qzsowing", "qzreaping"]  # two tools
GIVEN = "qzgift"  # what both are given


def build_encoder(tokenizer: Any, template: str, max_length: int, on_overflow: str) -> Encoder:
    """An encoder for a tokenizer and `data.template`.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: chat (the tokenizer's own, of several default, and tool_use for rows with tools) or tulu.

    Raises:
        UserError: no offsets, no chat template, no end-of-sequence token, or a template that offsets cannot follow.
    """
    templates = _templates(tokenizer, template)
    settings = (tokenizer, template == "tulu", max_length, on_overflow)
    encoder = _follow(templates["default"], *settings)
    if "tool_use" not in templates:
        return encoder
    try:
        return replace(encoder, for_tools=_follow(templates["tool_use"], *settings))
    except UserError:  # rows without tools do not need it, others are rejected
        return replace(encoder, writes_tools=False)


def _templates(tokenizer: Any, template: str) -> dict[str, str]:
    """By name; a template alone is the default."""
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} gives no character offsets: convert it to a fast one")
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no eos_token: set one in its tokenizer_config.json")
    found = TULU if template == "tulu" else tokenizer.chat_template
    if not found:
        raise UserError(f"the tokenizer of {name} has no chat template: set data.template: tulu")
    templates = found if isinstance(found, dict) else {"default": found}
    if "default" not in templates:
        raise UserError(
            f"the tokenizer of {name} has chat templates named {', '.join(templates)}, and none named default: name "
            "one so, or set data.template: tulu"
        )
    return templates


def _follow(jinja: str, tokenizer: Any, add_special_tokens: bool, max_length: int, on_overflow: str) -> Encoder:
    specials = {str(t) for t in tokenizer.all_special_tokens}
    specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    try:
        draft = Encoder(tokenizer, jinja, add_special_tokens, max_length, on_overflow, (), (), "", False, False)
        calling, written = _calling(draft)
        enders = {tokenizer.eos_token, _end_of_turn(draft, specials)} | ({"<|eom_id|>"} & specials)
        enders |= _end_of_calls(draft, calling, specials) if calling else set()
        prompted, asked = (draft.apply(_probe()[:1], None, prompt=prompt)[0] for prompt in (True, False))
        draft = replace(
            draft,
            enders=tuple(sorted(enders)),
            prompt=prompted.removeprefix(asked) if prompted.startswith(asked) else "",
            written_arguments=written,
            writes_tools=_writes_tools(draft),
        )
        markers = specials | set(_turn_markers(draft, calling, specials))
        seen = {form for marker in markers for form in forms(tokenizer, marker)} - {""}
        encoder = replace(draft, markers=tuple(sorted(seen)))
        conversation = _probe()
        text, spans = encoder.render(conversation, None)
        answers = [m["content"] for m in conversation if m["role"] == "assistant"]
        if len(spans) != len(answers) or not all(a in text[s:e] for a, (s, e) in zip(answers, spans, strict=True)):
            raise RowError("the answers are not where the template says", repr(text))
    except RowError as error:
        why = error.detail if error.reason == UNFOLLOWED else f"{error.reason}; {error.detail}"
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot be followed ({why}): {WAY_OUT}"
        ) from error
    return encoder


def _probe() -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(PROBE)]


def _end_of_turn(draft: Encoder, specials: set[str]) -> str:
    """The special token that ends an answer."""
    text, longer = (draft.apply(_probe()[:turns], None)[0] for turns in (2, 3))
    end = _end_after(PROBE[1], text, longer, draft.tokenizer.eos_token, specials)
    if end is None:
        raise RowError("no special token follows an answer", repr(longer))
    return end


def _writes_tools(draft: Encoder) -> bool:
    function = {"name": CALLED[0], "description": GIVEN, "parameters": {"type": "object", "properties": {}}}
    try:
        return CALLED[0] in draft.apply(_probe()[:1], [{"type": "function", "function": function}])[0]
    except RowError:
        return False


def _calling(draft: Encoder) -> tuple[list[Message], bool]:
    """A conversation with calls of tools, as the template takes it, and whether it wants their arguments as JSON text;
    empty where it takes none."""
    for names, written in itertools.product((CALLED, CALLED[:1]), (False, True)):  # some take one call
        calls = [
            {"id": f"{name:0>9}", "type": "function", "function": {"name": name, "arguments": {"qzfor": GIVEN}}}
            for name in names
        ]
        result = {"role": "tool", "content": "qztool", "name": names[0], "tool_call_id": calls[0]["id"]}
        question, *rest = _probe()
        turns = [question, {"role": "assistant", "content": "", "tool_calls": calls}, result, *rest]
        turns = with_written_arguments(turns) if written else turns
        with contextlib.suppress(RowError):
            text, _ = draft.apply(turns, None)
            if text.count(GIVEN) == len(names) and "{'qzfor'" not in text:  # as Python writes an object
                return turns, written
    return [], False


def _end_of_calls(draft: Encoder, turns: list[Message], specials: set[str]) -> set[str]:
    """The special token that ends calls of tools, in some templates another than that of answers (gpt-oss, GLM)."""
    text, longer = (draft.apply(turns[:some], None)[0] for some in (2, 3))
    end = _end_after(GIVEN, text, longer, draft.tokenizer.eos_token, specials)
    between = text[text.index(GIVEN) : text.rindex(GIVEN)]
    return {end} if end and end not in between else set()


def _end_after(word: str, text: str, longer: str, eos: str, specials: set[str]) -> str | None:
    """The special token that ends the turn that a word is the last of; `longer` is the text with a turn more."""
    tail, rest = text.rpartition(word)[2].rstrip(), longer.rpartition(word)[2]
    if rest.startswith(tail) and (at_end := [s for s in specials if tail.endswith(s)]):
        return max(at_end, key=len)  # others may precede it, as Cohere's <|END_RESPONSE|>
    special, rest = any_of(tuple(specials)), rest.lstrip()
    following = []
    while found := special.match(rest):
        following.append(found[0])
        rest = rest[found.end() :].lstrip()
    return eos if eos in following else next(iter(following), None)


def _turn_markers(draft: Encoder, calling: list[Message], specials: set[str]) -> Iterator[str]:
    """Plain texts that the template opens and ends turns with; special tokens are refused in any case."""
    system, tool = ({"role": role, "content": f"qz{role}"} for role in ("system", "tool"))
    instructions: list[str] = []  # the template's own, before the first question, whose header comes again
    for turns in (_probe(), [system, *_probe()], calling or [*_probe(), tool]):
        with contextlib.suppress(RowError):  # templates that take no such turn
            text, spans = draft.locate(turns, None)
            # which begins a text, not a turn
            begins = len(text) - len(text.removeprefix(draft.tokenizer.bos_token or ""))
            first, *others = _markers_in(text[begins:], [(a - begins, b - begins) for a, b in spans], specials)
            if turns[0] == system:
                yield from (marker for marker in first if marker not in instructions)
            instructions += first
            yield from itertools.chain(*others)


def _markers_in(text: str, spans: list[Span], specials: set[str]) -> Iterator[list[str]]:
    """What may open and end turns in the text before each turn, and after the last."""
    for start, end in reversed(spans):  # what the template adds within an answer, such as <think>, opens no turn
        text = text[:start] + PROBE[1] + text[end:]
    special = any_of(tuple(specials))
    for header in re.split("|".join(["qzsystem", "qztool", *PROBE]), text):
        header = THOUGHTS.sub(" ", header)
        found = BRACKETED.findall(special.sub(" ", header))
        # a header of plain words (### Response:, USER:) is a marker; with special tokens they alone open the turn
        line = header.strip().rpartition("\n")[2]
        if re.search(r"\w", line) and not found and not special.search(header):  # not the quotes of a tool's JSON
            found = [line]
        yield found
