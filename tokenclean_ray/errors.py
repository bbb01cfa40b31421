"""Errors that a user can mend, in one line and without secrets."""

import difflib
import os
import re
from typing import Any

USERINFO = re.compile(r"""(?<=://)[^/\s"'\\@]+@""")
SECRET = "token|secret|password|passwd|key|signature|sig|credential|auth"
QUERY = re.compile(rf"""([?&;][^=&;\s"'\\]*(?:{SECRET})[^=&;\s"'\\]*=)[^&;\s"'\\#]+""", re.IGNORECASE)
SECRET_VARIABLE = re.compile("(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIAL|CONNECTION_STRING)S?(_|$)")
SHORTEST_SECRET = 8  # characters: shorter values of such variables are words like "true"


def redact(text: str) -> str:
    """A text as it may be shown and stored: no credentials of URLs, no secrets of the environment."""
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return QUERY.sub(r"\1***", USERINFO.sub("***@", text))


class UserError(ValueError):
    """Something the user can mend. The message says what to change; the command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def nearest(name: str, known: Any) -> str:
    """`; did you mean X?` for the closest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def why(error: BaseException) -> str:
    """A library's error as the end of a line of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__
