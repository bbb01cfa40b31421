"""What the names of files end in: whatever decides their contents, in a few hex digits."""

import hashlib
import json
from typing import Any


def digest(identity: Any, digits: int = 8) -> str:
    """Hex digits of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:digits]
