"""What is no JSON object is refused, with a reason; whole files of it: test_source.py and test_bad_input.py."""

import pytest

from tokenclean_ray.json_text import parse_line
from tokenclean_ray.schema import RowError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_parse_line_refuses(text, reason):
    found = parse_line(text)
    assert isinstance(found, RowError)
    assert found.reason == reason
    assert found.detail
