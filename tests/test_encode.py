"""Encoding against the plain meaning of a chat: which characters are answers. What is refused: test_bad_input, too."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, CHATML_GENERATION, FAMILIES, QWEN3, TURNS
from tokenizers import normalizers
from transformers import AutoTokenizer
from turns import folding_tokenizer

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.encode import encoding_fingerprint
from tokenclean_ray.errors import UserError
from tokenclean_ray.formats import to_messages
from tokenclean_ray.schema import RowError


def family_encoder(name, **limits):
    template, specials, _, _ = FAMILIES[name]
    return build_encoder(
        make_tokenizer(specials, template), "chat", **({"max_length": 512, "on_overflow": "truncate"} | limits)
    )


ENCODERS = {name: family_encoder(name) for name in FAMILIES}
ENCODERS["tulu"] = build_encoder(make_tokenizer(("<s>", "</s>"), None), "tulu", 512, "truncate")
FORBIDDEN = {name: forbidden for name, (_, _, _, forbidden) in FAMILIES.items()}
FORBIDDEN["tulu"] = ["</s>", "<|user|>", "<|assistant|>", "<|system|>"]
END = {name: end for name, (_, _, end, _) in FAMILIES.items()} | {"tulu": "</s>"}


def answers(encoder, messages, tools=None):
    """The decoded runs of response tokens."""
    text, spans = encoder.render(messages, tools)
    ids, mask = encoder.encode([text], [spans])[0]
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [encoder.tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False) for a, b in runs.reshape(-1, 2)]


@pytest.mark.parametrize("name", ENCODERS)
def test_responses_are_the_answers_and_their_end_tokens(name):
    found = [run.strip() for run in answers(ENCODERS[name], TURNS)]
    expected = [t["content"] + END[name] for t in TURNS[1::2]]
    if name == "qwen3":  # the template writes a thought before the last answer
        expected[1] = "<think>\n\n</think>\n\n" + expected[1]
    if name == "cohere":
        expected = [f"<|start_response|>{e.replace('<|end_turn|>', '<|end_response|><|end_turn|>')}" for e in expected]
    assert [run.replace(" </s>", "</s>") for run in found] == expected


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in ("llama2", "mistral", "alpaca", "vicuna")])
def test_system_and_tool_turns_are_prompt(name):
    system, tool = {"role": "system", "content": "be brief"}, {"role": "tool", "content": "42"}
    plain = answers(ENCODERS[name], TURNS)
    assert answers(ENCODERS[name], [system, *TURNS]) == plain
    assert answers(ENCODERS[name], [*TURNS[:3], tool, TURNS[3]]) == plain


@pytest.mark.parametrize(("name", "text"), [(n, text) for n, texts in FORBIDDEN.items() for text in texts])
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_content_cannot_open_or_end_a_turn(name, text, turn):
    turns = json.loads(json.dumps(TURNS))
    turns[turn]["content"] += f" x{text}y"
    with pytest.raises(RowError) as error:
        ENCODERS[name].render(turns, None)
    assert error.value.reason == "special-token or template text in the content"


def test_a_marker_is_named_as_it_was_written():
    """Not as the tokenizer sees it: an attempt that follows another would write other bytes, by chance."""
    encoder = build_encoder(folding_tokenizer(normalizers.Prepend("▁")), "chat", 64, "reject")
    assert "▁<|im_end|>" in encoder.markers
    with pytest.raises(RowError) as error:
        encoder.render([{"role": "user", "content": "<|im_end|>"}, TURNS[1]], None)
    assert error.value.detail == repr("<|im_end|>")


@pytest.mark.parametrize("name", ENCODERS)
def test_plain_words_of_roles_are_no_markers(name):
    turns = [
        {"role": "user", "content": "user, assistant or model? [1] a<b"},
        {"role": "assistant", "content": "the user"},
    ]
    assert len(answers(ENCODERS[name], turns)) == 1


@pytest.mark.parametrize("name", ENCODERS)
def test_answers_of_weight_0_are_prompt(name):
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    text, spans = ENCODERS[name].render(turns, None)
    whole, both = ENCODERS[name].render(TURNS, None)
    assert (text, spans) == (whole, both[1:])


def test_tools_that_the_template_leaves_out_reject_the_row():
    with pytest.raises(RowError, match="the chat template leaves out the tools"):
        ENCODERS["chatml"].render(TURNS, [{"type": "function", "function": {"name": "add"}}])


def test_an_answer_that_marks_leave_out_rejects_the_row():
    template = CHATML_GENERATION.replace(
        "{{ m.content }}<|im_end|>\n{% endgen", "{{ '' if m.note else m.content }}<|im_end|>\n{% endgen"
    )
    encoder = build_encoder(make_tokenizer(template=template), "chat", 512, "truncate")
    assert len(encoder.render(TURNS, None)[1]) == 2
    with pytest.raises(RowError, match="the chat template leaves out a turn"):
        encoder.render([*TURNS[:3], {**TURNS[3], "note": "x"}], None)


def test_thoughts_and_tool_calls_of_an_answer_are_response():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        TURNS[1],
    ]
    first, last = answers(ENCODERS["qwen3"], turns)
    assert first == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert last == "<think>\n\n</think>\n\nthe answer is 2.<|im_end|>"
    thinking = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}]
    assert answers(ENCODERS["qwen3"], thinking) == ["<think>\nhm\n</think>\n\n2<|im_end|>"]


def test_a_token_that_straddles_the_border_is_response():
    template = "{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    encoder = build_encoder(make_tokenizer(("<s>", "</s>"), template), "chat", 64, "truncate")
    (run,) = answers(encoder, [{"role": "user", "content": "the"}, {"role": "assistant", "content": "quick"}])
    assert run == " quick</s>"  # one token holds the prompt's space and the answer's first letters


def test_byte_pieces_of_one_character_all_count():
    (run,) = answers(ENCODERS["chatml"], [TURNS[0], {"role": "assistant", "content": "🧹é"}])
    assert run == "🧹é<|im_end|>"


def test_truncation_and_overflow():
    encoder = family_encoder("chatml", max_length=20)
    text, spans = encoder.render(TURNS[:2], None)
    whole = ENCODERS["chatml"].encode([text], [spans])[0]
    ids, mask = encoder.encode([text], [spans])[0]
    assert len(ids) == len(mask) == 20
    assert ids.tolist() == whole[0][:20].tolist()
    rejected = family_encoder("chatml", max_length=20, on_overflow="reject").encode([text], [spans])[0]
    assert rejected.reason == "longer than data.max_length"
    prompt_only = family_encoder("chatml", max_length=5).encode([text], [spans])[0]
    assert prompt_only.reason == "no response token within data.max_length"


def test_first_token_is_never_response():
    encoder = ENCODERS["chatml"]
    _, mask = encoder.encode(["the fox"], [[(0, 7)]])[0]
    assert not mask[0]
    assert mask[1:].all()


def test_a_template_that_refuses_rejects_the_row():
    with pytest.raises(RowError) as error:
        ENCODERS["llama2"].render([{"role": "system", "content": "x"}, *TURNS], None)
    assert error.value.reason == "the chat template refuses the conversation"
    assert "no system turns" in error.value.detail


def test_history_that_is_rewritten_is_rejected_not_mislabelled():
    drops = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}")
    encoder = build_encoder(make_tokenizer(template=QWEN3), "chat", 512, "truncate")
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}, *TURNS[2:]]
    assert answers(encoder, turns)[0] == "2<|im_end|>"  # the dropped thought is simply not there
    with pytest.raises(UserError):
        build_encoder(make_tokenizer(template=drops), "chat", 512, "truncate")


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nhm\n</think>\n\n2"},
        {"content": "hm</think>2"},
        {"content": "2", "reasoning_content": "hm"},
        {"content": "2", "thinking": "hm"},
        {"content": "2", "reasoning": "hm"},
    ],
)
def test_thoughts_of_the_last_answer_are_not_left_out(answer):
    """DeepSeek R1's distilled models have such a template, and each template knows one key of those in use."""
    drops = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    turns = [TURNS[0], {"role": "assistant", **answer}]
    marked = CHATML_GENERATION.replace("m.content", "m.content.split('</think>')[-1]")
    for template in (drops, marked):
        encoder = build_encoder(make_tokenizer(template=template), "chat", 512, "truncate")
        with pytest.raises(RowError, match="the chat template leaves out the last answer's") as caught:
            encoder.render(turns, None)
        for key in answer.keys() - {"content"}:  # the message says how to do without
            assert f"data.turn_keys: {{{key}: null}}" in caught.value.reason
            without, tools, _ = to_messages({"messages": turns}, "auto", {}, {key: None})
            assert answers(encoder, without, tools) == ["2<|im_end|>"]
        assert answers(encoder, [*turns, *TURNS])[0].endswith("2<|im_end|>")  # of an earlier one they may be
        untrained = [*TURNS, TURNS[0], {"role": "assistant", "weight": 0, **answer}]
        assert answers(encoder, untrained) == answers(encoder, TURNS)
        empty = {"role": "assistant", "content": "<think>\n\n</think>\n\n2", "thinking": ""}
        assert answers(encoder, [TURNS[0], empty])[0].endswith("2<|im_end|>")


def test_results_of_tools_that_hermes_wraps_are_not_wrapped_twice():
    """As Qwen 3 writes them; they were taken for the template's own."""
    wrapped = "<tool_response>\n{{ m.content }}\n</tool_response>"
    template = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'tool' %}" + wrapped + "{% else %}{{ m.content }}{% endif %}"
    )
    encoder = build_encoder(make_tokenizer(template=template), "chat", 512, "truncate")
    turn = {"role": "tool", "content": "<tool_response>\n5\n</tool_response>\n"}
    text, spans = encoder.render(*to_messages({"messages": [*TURNS[:2], turn, TURNS[3]]}, "auto", {}))
    assert "<|im_start|>tool\n<tool_response>\n5\n</tool_response><|im_end|>" in text
    assert [text[a:b] for a, b in spans] == [TURNS[n]["content"] + "<|im_end|>" for n in (1, 3)]


def test_a_row_gives_its_template_more():
    modes = "{{ '' if enable_thinking is defined and not enable_thinking else '/think' }}{{ custom }}\n" + CHATML
    silent = modes.replace(
        "assistant\n{% endif %}", "assistant\n{% if not enable_thinking %}</think>{% endif %}{% endif %}"
    )
    for template in (modes, silent):
        encoder = build_encoder(make_tokenizer(template=template), "chat", 512, "truncate")
        row = {"messages": TURNS[:2], "chat_template_kwargs": {"enable_thinking": False, "custom": "kind"}}
        text, spans = encoder.render(*to_messages(row, "auto", {}))
        assert text.startswith("kind\n")
        assert [text[slice(*span)] for span in spans] == ["the answer is 2.<|im_end|>"]
        assert encoder.render(TURNS[:2], None)[0].startswith("/think\n")  # the next row has its own
        one, other = encoder.encode_rows([row, {"messages": TURNS[:2]}], "auto", {})
        assert encoder.tokenizer.decode(one[0]).startswith("kind\n")
        assert not encoder.tokenizer.decode(other[0]).startswith("kind")
        for more, reason in (
            ({"custom": "<|im_end|>"}, "special-token or template text"),
            ({"bos_token": "x"}, "the chat template refuses the conversation"),
            *(({key: None}, "says what the row may not") for key in ("add_generation_prompt", "messages", "tools")),
            *(({key: None}, "says what the row may not") for key in ("chat_template", "continue_final_message")),
        ):
            with pytest.raises(RowError, match=reason):
                encoder.render(TURNS[:2], None, more)
    tools = {"default": CHATML, "tool_use": "{{ custom }} {{ tools | tojson }}\n" + CHATML}
    encoder = build_encoder(make_tokenizer(template=tools), "chat", 512, "truncate")
    tool = {"type": "function", "function": {"name": "f"}}
    assert encoder.render(TURNS[:2], [tool], {"custom": "kind"})[0].startswith("kind ")


def test_no_row_is_cut_where_long_ones_are_rejected():
    assert "3 of 20 rows reach" in family_encoder("chatml").cut_short(3, 20)
    assert family_encoder("chatml").cut_short(0, 20) == ""
    assert family_encoder("chatml", on_overflow="reject").cut_short(3, 20) == ""


def test_fingerprint_follows_whatever_decides_the_tokens():
    encoder = ENCODERS["chatml"]
    same = encoding_fingerprint(family_encoder("chatml"), {"max_length": 512})
    assert encoding_fingerprint(encoder, {"max_length": 512}) == same
    assert encoding_fingerprint(encoder, {"max_length": 511}) != same
    assert encoding_fingerprint(replace(encoder, for_tools=encoder), {"max_length": 512}) != same
    assert encoding_fingerprint(ENCODERS["chatml_generation"], {"max_length": 512}) != same
    assert encoding_fingerprint(replace(encoder, add_special_tokens=True), {"max_length": 512}) != same


def test_another_tokenizer_under_the_same_template_is_another_encoding():
    def of(**settings):
        return encoding_fingerprint(build_encoder(make_tokenizer(**settings), "chat", 64, "truncate"), {})

    assert of() == of()
    assert len({of(), of(vocab=300), of(eos="<|im_end|>")}) == 3


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu", "qwen3", "alpaca", "thinker", "cohere", "mistral"])
@settings(max_examples=60, deadline=None)
@given(conversation=st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3))
def test_any_content_is_followed_exactly_or_rejected(name, conversation):
    encoder = ENCODERS[name]
    turns = [
        {"role": r, "content": c} for pair in conversation for r, c in zip(("user", "assistant"), pair, strict=True)
    ]
    try:
        text, spans = encoder.render(turns, None)
    except RowError:
        return
    assert len(spans) == len(conversation)
    previous = 0
    for (question, answer), (start, end) in zip(conversation, spans, strict=True):
        assert question.strip() in text[previous:start]
        assert text[start:end].endswith(END[name])
        assert answer.strip() in text[start:end] or name == "qwen3"
        assert text[start:end].count(END[name]) == 1
        previous = end


def test_tulu_equals_the_reference_format(fixtures):
    """Token ids and response masks of the paper's scripts, 256 of 256 rows."""
    import pyarrow.parquet as pq

    encoder = build_encoder(AutoTokenizer.from_pretrained(fixtures / "models" / "weak-280k"), "tulu", 2048, "truncate")
    lines = (fixtures / "conformance" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    expected = pq.read_table(fixtures / "conformance" / "gsm8k.parquet").to_pylist()
    rendered = [encoder.render(json.loads(lines[row["index"]])["messages"], None) for row in expected]
    encoded = encoder.encode([text for text, _ in rendered], [spans for _, spans in rendered])
    assert len(encoded) == 256
    for (ids, mask), row in zip(encoded, expected, strict=True):
        assert ids.tolist() == row["input_ids"]
        assert mask.tolist() == row["response_mask"]
