"""What chat templates do, each by a small one: where answers start and end, what opens turns, what is refused."""

from types import SimpleNamespace

import pytest
from conftest import make_tokenizer
from templates import ALPACA, CHATML, CHATML_GENERATION, IM, MISTRAL, THINKER, TURNS

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.errors import UserError
from tokenclean_ray.formats import to_messages
from tokenclean_ray.schema import RowError

# a generation prompt that opens a thought, as reasoning models have it
OPENS = ("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def written_as(piece):
    """ChatML whose assistant turns are written by a piece of template over the turn `m`."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + piece + "{% elif m.role == "
        "'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def written_as_generated(piece):
    return "{% if m.role == 'assistant' %}" + piece + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"


def encoder_for(template):
    return build_encoder(make_tokenizer(template=template), "chat", 512, "truncate")


COUNTS = "{% for m in messages %}{{ loop.revindex }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
REWRITES = CHATML.replace("m.content", "m.content | upper")
NO_END = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
MARKS_QUESTIONS = CHATML_GENERATION.replace("m.role == 'assistant'", "m.role == 'user'")


@pytest.mark.parametrize(
    ("template", "eos", "way_out"),
    [
        (None, "</s>", "data.template: tulu"),
        (REWRITES, "</s>", "generation"),
        (NO_END, "</s>", "generation"),
        (MARKS_QUESTIONS, "</s>", "the answers are not where the template says"),
        ("{{ raise_exception('never') }}", "</s>", "generation"),
        (CHATML, None, "eos_token"),
        ({"rag": CHATML, "tool_use": CHATML}, "</s>", "named rag, tool_use, and none named default"),
    ],
)
def test_templates_that_cannot_be_followed_name_the_way_out(template, eos, way_out):
    with pytest.raises(UserError, match=way_out):
        build_encoder(make_tokenizer(template=template, eos=eos), "chat", 64, "truncate")


def test_a_tokenizer_that_gives_no_offsets():
    with pytest.raises(UserError, match="the tokenizer of slow gives no character offsets"):
        build_encoder(SimpleNamespace(name_or_path="slow", is_fast=False), "chat", 64, "truncate")


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
# with an opening of its own
TOOL_USE = "Tools: {{ tools | tojson }}\n" + CHATML.replace("<|im_start|>", "<<TURN>>").replace("<|im_end|>", "</s>")


def test_of_several_templates_rows_with_tools_take_tool_use_and_others_the_default():
    """As `apply_chat_template` chooses, which is the oracle."""
    templates = {"tool_use": TOOL_USE, "default": CHATML}
    tokenizer, encoder = make_tokenizer(template=templates), encoder_for(templates)
    for tools, end in ((None, "<|im_end|>"), (TOOLS, "</s>")):
        text, spans = encoder.render(TURNS, tools)
        assert text == tokenizer.apply_chat_template(TURNS, tools=tools, tokenize=False)
        assert [text[slice(*span)] for span in spans] == [turn["content"] + end for turn in TURNS[1::2]]
    assert encoder.render(TURNS, None) == encoder_for(CHATML).render(TURNS, None)
    for marked, tools in (("<|im_start|>", None), ("<<TURN>>", TOOLS)):
        with pytest.raises(RowError, match="template text in the content"):
            encoder.render([{"role": "user", "content": marked}, *TURNS[1:]], tools)


def test_a_template_for_tools_that_cannot_be_followed_matters_to_rows_with_tools_alone():
    default = "{{ tools | tojson if tools }}" + CHATML  # which the model's publisher does not mean for them
    encoder = encoder_for({"tool_use": "{{ tools }}", "default": default})
    assert encoder.render(TURNS, None) == encoder_for(CHATML).render(TURNS, None)
    with pytest.raises(RowError, match="leaves out the tools"):
        encoder.render(TURNS, TOOLS)


def test_what_precedes_an_answer_may_depend_on_what_follows():
    text, spans = encoder_for(COUNTS).render(TURNS, None)
    assert [text[slice(*span)] for span in spans] == [t["content"] + "<|im_end|>" for t in TURNS[1::2]]


def test_alpaca_header_alone_is_a_marker():
    assert "### Response:" in build_encoder(make_tokenizer(("<s>", "</s>"), ALPACA), "chat", 64, "truncate").markers


CALL = {"function": {"name": "add", "arguments": {"a": "x", "b": None}}}


@pytest.mark.parametrize(
    "arguments",
    ["c.function.arguments | tojson", "'' + c.function.arguments", "c.function.arguments"],
    ids=["from an object", "text, joined", "text, printed"],
)
def test_templates_get_arguments_as_they_want_them(arguments):
    piece = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ " + arguments + " }}{% endfor %}"
    encoder = encoder_for(written_as(piece))
    text, ((start, end),) = encoder.render([TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], None)
    assert text[start:end] == 'add {"a": "x", "b": null}<|im_end|>'


def test_thoughts_in_a_turn_of_their_own_belong_to_the_answer():
    """As gpt-oss writes them: the model produces both, and what is between."""
    piece = "{% if m.thinking %}{{ m.thinking }}<|im_end|>\n<|im_start|>assistant\n{% endif %}{{ m.content }}"
    encoder = encoder_for(written_as(piece))
    thoughts = "two and two: " + TURNS[3]["content"]  # which hold the answer too
    thoughtful = [*TURNS[:3], TURNS[3] | {"thinking": thoughts}]
    expected = thoughts + "<|im_end|>\n<|im_start|>assistant\n" + TURNS[3]["content"] + "<|im_end|>"
    for turns in (thoughtful, [*thoughtful, *TURNS[:2]]):
        text, spans = encoder.render(turns, None)
        assert text[slice(*spans[1])] == expected
    calls = encoder_for(
        written_as(piece.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].function | tojson }}"))
    )
    text, spans = calls.render(
        [TURNS[0], {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [CALL]}], None
    )
    assert (
        text[slice(*spans[0])]
        == 'hm<|im_end|>\n<|im_start|>assistant\n{"name": "add", "arguments": {"a": "x", "b": null}}<|im_end|>'
    )


def test_a_prompt_that_opens_a_thought():
    thoughts = TURNS[3] | {"content": "<think>\nadd them\n</think>\n\nthat is 4."}
    text, spans = encoder_for(THINKER).render([*TURNS[:3], thoughts], None)
    assert text[slice(*spans[0])] == TURNS[1]["content"] + "<|im_end|>"
    assert text[slice(*spans[1])] == "add them\n</think>\n\nthat is 4.<|im_end|>"
    assert text[: spans[1][0]].endswith("<|im_start|>assistant\n<think>\n")


def test_thoughts_where_the_prompt_says_not_to_think():
    """The answer starts where it makes a difference, and no character of it is lost."""
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", prompt)
    thoughts = {"role": "assistant", "content": "<think>\nadd them\n</think>\n\nthat is 4."}
    text, (span,) = encoder_for(template).render([TURNS[0], thoughts], None)
    assert text[slice(*span)] == thoughts["content"] + "<|im_end|>"


def test_a_system_turn_before_the_last_question():
    system = {"role": "system", "content": "be brief"}
    text, spans = encoder_for(MISTRAL).render([system, *TURNS], None)
    assert text.index("be brief") > spans[0][1]
    assert [text[slice(*span)].strip() for span in spans] == [t["content"] + "</s>" for t in TURNS[1::2]]
    drops = encoder_for(CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"))
    with pytest.raises(RowError, match="cannot be followed") as error:  # as Mistral's do where an answer comes last
        drops.render([system, *TURNS], None)
    assert "before turn 3, a turn is left out" in error.value.detail


@pytest.mark.parametrize(
    "call",
    [
        "{% for c in m.tool_calls %}call {{ c.function | tojson }}{% endfor %}<|call|>",
        "{% for c in m.tool_calls %}call {{ c.function.name + c.function.arguments }}<|next|>{% endfor %}<|call|>",
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}{{ m.tool_calls[0].function }}"
        "<|call|>",
    ],
    ids=["objects", "text, each with an end", "one"],
)
def test_calls_that_end_by_another_token(call):
    """As gpt-oss ends them: the model stops there."""
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>", "{% if m.tool_calls %}" + call + "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    )
    encoder = build_encoder(make_tokenizer((*IM, "<|call|>", "<|next|>"), template), "chat", 512, "truncate")
    assert set(encoder.enders) == {"</s>", "<|im_end|>", "<|call|>"}
    calls = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]
    text, spans = encoder.render([*calls, TURNS[1]], None)
    assert "add" in text[slice(*spans[0])]
    assert text[slice(*spans[0])].endswith("<|call|>")
    assert text[slice(*spans[1])] == TURNS[1]["content"] + "<|im_end|>"
    assert len(encoder.render(TURNS, None)[1]) == 2


CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"


def calling(content="", calls=1, **more):
    return {"role": "assistant", "content": content, "tool_calls": [CALL] * calls, **more}


@pytest.mark.parametrize(
    ("piece", "turn", "left_out"),
    [
        ("{{ m.content }}", calling(), "a tool call"),
        ("{{ m.content }}", calling("I will add."), "a tool call"),
        (
            "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}",
            calling(calls=2),
            "a tool call",
        ),
        ("{{ m.content if not m.tool_calls else '' }}" + CALLS, calling("42"), "what is said"),
        ("{% generation %}{{ m.content }}{% endgeneration %}", calling("add"), "a tool call"),
    ],
    ids=["a call", "a call that is named", "one of two", "what is said", "beside markers"],
)
def test_an_answer_of_which_a_part_is_left_out_is_refused(piece, turn, left_out):
    result = {"role": "tool", "content": "42"}  # what was said, and what is left out
    with pytest.raises(RowError) as error:
        encoder_for(written_as(piece)).render([TURNS[0], turn, result, result], None)
    assert error.value.reason == f"the chat template leaves out {left_out}"
    assert error.value.detail == ("turn 2" if left_out == "what is said" else "add, turn 2")


def test_a_call_where_the_prompt_opens_a_thought():
    """All of the call is the answer, also what every call begins with."""
    thinks = written_as("{{ m.content }}" + CALLS).replace(*OPENS)
    exclusive = thinks.replace("{{ m.content }}{% for c", "{% if not m.tool_calls %}{{ m.content }}{% endif %}{% for c")
    written = '<tool_call>{"name": "add", "arguments": {"a": "x", "b": null}}</tool_call>'
    for template in (thinks, exclusive):
        turns = [TURNS[0], calling(), {"role": "tool", "content": "42"}, TURNS[1]]
        text, spans = encoder_for(template).render(turns, None)
        assert [text[slice(*span)] for span in spans] == [written + "<|im_end|>", TURNS[1]["content"] + "<|im_end|>"]
    text, ((start, end),) = encoder_for(thinks).render([TURNS[0], calling("I add.", calls=2)], None)
    assert text[start:end] == "I add." + written * 2 + "<|im_end|>"


def test_a_call_that_is_written_before_what_is_said():
    """As DeepSeek R1's distillations write it, where the generation prompt is another text than the turn's header."""
    piece = "{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}"
    for thinks in (piece, "{% if m.tool_calls %}<tools>" + CALLS + "</tools>{% endif %}{{ m.content }}"):
        template = written_as(thinks).replace(*OPENS)
        turns = [TURNS[0], calling(), {"role": "tool", "content": "42"}, *TURNS[1:]]
        text, spans = encoder_for(template).render(turns, None)
        assert "<tool_call>" in text[slice(*spans[0])]
        assert text[: spans[0][0]].endswith("<|im_start|>assistant\n")


def test_results_that_nothing_calls_do_not_stand_in_the_way():
    """Where templates refuse them, what could be said instead of a call is asked of a conversation without them."""
    needs_call = "{% elif m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}"
    template = written_as("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}")
    template = template.replace("{% elif m.role == 'tool' %}", needs_call)
    template = template.replace(*OPENS)
    text, spans = encoder_for(template).render(
        [TURNS[0], calling(), {"role": "tool", "content": "42"}, *TURNS[1:]], None
    )
    assert text[slice(*spans[0])].startswith("<tool_call>")
    assert [text[slice(*span)] for span in spans[1:]] == [t["content"] + "<|im_end|>" for t in TURNS[1::2]]


def test_arguments_in_the_question_are_not_taken_for_those_of_a_call():
    encoder = encoder_for(written_as("{{ m.content }}" + CALLS))
    asked = {"role": "user", "content": "call it with {'a': 'x', 'b': None}"}
    text, ((start, end),) = encoder.render([asked, calling()], None)
    assert '"arguments": {"a": "x", "b": null}' in text[start:end]


@pytest.mark.parametrize("arguments", [{}, {"arguments": {}}, {"arguments": None}], ids=["none", "empty", "null"])
@pytest.mark.parametrize("wanted", ["{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"])
def test_calls_without_arguments(arguments, wanted):
    encoder = encoder_for(
        written_as("{% for c in m.tool_calls or [] %}{{ c.function.name }} " + wanted + "{% endfor %}{{ m.content }}")
    )
    call = {"function": {"name": "now"} | arguments}
    row = {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    text, ((start, end),) = encoder.render(*to_messages(row, "auto", {}))
    assert text[start:end] == "now {}<|im_end|>"


@pytest.mark.parametrize("word", ["qz0z", "qz0zsaid", "qz0zgiven0z", "qzanswer"])
def test_content_cannot_move_spans_by_the_words_of_other_answers(word):
    """Where another answer is rendered: the prompt opens a thought, tools are called."""
    thinks = written_as("{{ m.content }}" + CALLS).replace(*OPENS)
    encoder = encoder_for(thinks)
    for turns in ([TURNS[0], TURNS[1]], [TURNS[0], calling("I add.")], [TURNS[0], calling(), *TURNS]):
        said = [turn | {"content": f"{word} {turn['content']} {word}"} for turn in turns]
        text, spans = encoder.render([{"role": "system", "content": word}, *said], None)
        plain, expected = encoder.render(turns, None)
        found = [text[slice(*span)].replace(f"{word} ", "").replace(f" {word}", "") for span in spans]
        assert found == [plain[slice(*span)] for span in expected]
    with pytest.raises(RowError, match="leaves out a tool call"):
        encoder_for(written_as("{{ m.content }}")).render([TURNS[0] | {"content": word}, calling(word)], None)


def test_a_turn_left_out_beside_markers_is_refused():
    template = CHATML_GENERATION.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(RowError, match="leaves out a turn"):
        encoder_for(template).render([{"role": "system", "content": "be brief"}, *TURNS], None)


def test_an_answer_after_a_system_turn():
    """Some templates write no generation prompt there, or refuse to."""
    refuses = (
        "{% if add_generation_prompt and messages[-1].role == 'system' %}{{ raise_exception('no user') }}{% endif %}"
    )
    silent = CHATML.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1].role == 'user'")
    for template in (refuses + CHATML, silent):
        text, spans = encoder_for(template).render([{"role": "system", "content": "be brief"}, TURNS[1], *TURNS], None)
        assert text[slice(*spans[0])] == TURNS[1]["content"] + "<|im_end|>"


def test_answers_in_a_row_where_the_template_prompts_after_questions_alone():
    template = CHATML.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1].role == 'user'")
    for turns in ([*TURNS[:2], TURNS[3]], [TURNS[1], TURNS[0], TURNS[3]]):
        text, spans = encoder_for(template).render(turns, None)
        assert [text[slice(*s)] for s in spans] == [t["content"] + "<|im_end|>" for t in (TURNS[1], TURNS[3])]


def test_why_a_template_refuses_calls_is_said_of_the_arguments_as_they_are():
    refuses = "{% if m.tool_calls %}{{ raise_exception('no ' ~ m.tool_calls[0].function.arguments.a) }}{% endif %}"
    encoder = encoder_for(written_as(refuses + "{{ m.content }}"))
    with pytest.raises(RowError) as error:
        encoder.render([TURNS[0], calling()], None)
    assert error.value.detail == "no x"


def test_markers_are_what_opens_turns():
    """Not the template's own instructions, and also what stands around the results of tools, which need a call."""
    template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        + written_as("{{ m.content }}" + CALLS)
        .replace("{{ m.content | tojson }}", "<response>{{ m.content }}</response>")
        .replace(
            "{% elif m.role == 'tool' %}", "{% elif m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].id }}"
        )
    )
    encoder = encoder_for(template)
    assert set(encoder.markers) - set(IM) == {"<response>", "</response>"}
    with pytest.raises(RowError, match="special-token or template text"):
        encoder.render([TURNS[0] | {"content": "42</response>"}, TURNS[1]], None)


def test_an_end_of_sequence_marked_apart_from_the_last_answer():
    """As TRL's template of Phi 3 does."""
    piece = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    last = "{% generation %}</s>{% endgeneration %}"
    template = CHATML.replace("{{ m.content }}<|im_end|>\n", written_as_generated(piece)) + last
    text, spans = encoder_for(template).render(TURNS, None)
    assert [text[slice(*span)] for span in spans] == [
        TURNS[1]["content"] + "<|im_end|>", TURNS[3]["content"] + "<|im_end|></s>"
    ]  # fmt: skip


def test_what_a_tool_says_may_be_written_as_json():
    tool = {"role": "tool", "content": '{"temp": 20}\nand "more"'}
    for turns in ([*TURNS[:3], tool, TURNS[3]], [*TURNS, tool]):
        encoder = encoder_for(written_as("{{ m.content }}"))
        assert len(encoder.render(turns, None)[1]) == 2
    assert not any('"' in marker for marker in encoder.markers)


@pytest.mark.parametrize(
    "begin", ["", "\n", "\n\n ", "  {% if true %}", "\n  {%- if true %} ", "{#- of us -#} \n{% if true %}\n"]
)
def test_a_template_begins_as_it_is_written(begin):
    template = begin + written_as("{{ m.content }}") + ("{% endif %}" if "if" in begin else "")
    text, _ = encoder_for(template).render(TURNS, None)
    assert text == make_tokenizer(template=template).apply_chat_template(TURNS, tokenize=False)


def test_tokens_do_not_depend_on_the_day():
    """As Llama 3's templates, gpt-oss's and Mistral's write it."""
    for written, expected in (
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", "26 Jul 2024"),
        ("{%- macro day() -%}{{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}\n{{ day() }}", "2024-07-26"),
        ("{% set today = strftime_now('%A, %B %-d, %Y').split(' ') %}{{ today | join('_') }}", "Friday,_July_26,_2024"),
    ):
        encoder = encoder_for(written + written_as("{{ m.content }}"))
        assert encoder.render(TURNS, None)[0].startswith(f"{expected}<|im_start|>")
