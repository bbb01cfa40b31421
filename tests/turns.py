"""Whether content can open or end a turn: an oracle that compares a conversation to the same one in plain words."""

from conftest import make_tokenizer
from templates import CHATML, FAMILIES, IM
from tokenizers import AddedToken, normalizers

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.formats import to_messages

MAX_LENGTH = 1 << 20  # nothing is cut, so that every token can be accounted for
TULU_MARKERS = ["</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]


def folding_tokenizer(normalizer):
    """One that finds its special tokens in the text as it has rewritten it."""
    tokenizer = make_tokenizer(IM, CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in IM])
    return tokenizer


def _encoder(specials, template, kind="chat"):
    return build_encoder(make_tokenizer(specials, template), kind, MAX_LENGTH, "reject")


# name → (encoder, texts that would open or end a turn)
ENCODERS = {name: (_encoder(f[1], f[0]), f[3]) for name, f in FAMILIES.items()}
ENCODERS["tulu"] = (_encoder(("<s>", "</s>"), None, "tulu"), TULU_MARKERS)
for name, normalizer in (("nfkc", normalizers.NFKC()), ("lowercase", normalizers.Lowercase())):
    ENCODERS[name] = (build_encoder(folding_tokenizer(normalizer), "chat", MAX_LENGTH, "reject"), list(IM))


def plain(value, words):
    """A value of the same shape that holds plain words; roles, and text that is none, stay."""
    match value:
        case str():
            return f"qz{next(words)}" if value.strip() else value
        case dict():
            return {key if key in KEYS else plain(key, words): plain(inner, words) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner, words) for inner in value]
    return value


KEYS = {"role", "content", "tool_calls", "type", "function", "name", "arguments"}


def plain_turns(messages, tools):
    words = iter(range(1 << 30))
    turns = [plain(message, words) | {"role": message["role"]} for message in messages]
    return turns, plain(tools, words)


def check_row(name, row):
    """Encode a row; `RowError` where it is refused, `AssertionError` where its content passed for a turn.

    Returns:
        the text, the answers' spans, token ids and response mask.
    """
    encoder, markers = ENCODERS[name]
    messages, tools, _ = to_messages(row, "auto", {})
    text, spans = encoder.render(messages, tools)
    tokens = encoder.encode([text], [spans])[0]
    if isinstance(tokens, Exception):
        raise tokens
    ids, mask = tokens
    expected_text, expected_spans = encoder.render(*plain_turns(messages, tools))
    expected_ids, _ = encoder.encode([expected_text], [expected_spans])[0]
    assert special_ids(encoder, ids) == special_ids(encoder, expected_ids)
    assert [text.count(m) for m in markers] == [expected_text.count(m) for m in markers]
    assert len(spans) == len(expected_spans) == sum(m["role"] == "assistant" for m in messages)
    assert mask.tolist() == response_mask(encoder, ids, text, spans)
    return text, spans, ids, mask


def special_ids(encoder, ids) -> list[int]:
    special = {i for i, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids.tolist() if i in special]


# byte-level BPE writes each byte as one character; this is its table, made as GPT-2 made it
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}


def token_bytes(encoder, token: int) -> bytes:
    added = encoder.tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return added.content.encode()
    return bytes(BYTE_OF[c] for c in encoder.tokenizer.convert_ids_to_tokens(token))


def response_mask(encoder, ids, text, spans) -> list[bool]:
    """By bytes: a token is response where one of its bytes lies in a span. Needs a tokenizer that rewrites nothing."""
    pieces = [token_bytes(encoder, i) for i in ids.tolist()]
    normalizer = encoder.tokenizer.backend_tokenizer.normalizer
    if normalizer is not None and normalizer.normalize_str(text) != text:
        return encoder.encode([text], [spans])[0][1].tolist()
    assert b"".join(pieces) == text.encode()
    inside = bytearray(len(text.encode()))
    for start, end in spans:
        begin, stop = len(text[:start].encode()), len(text[:end].encode())
        inside[begin:stop] = b"\1" * (stop - begin)
    mask, at = [], 0
    for piece in pieces:
        mask.append(any(inside[at : at + len(piece)]))
        at += len(piece)
    return [False, *mask[1:]]
