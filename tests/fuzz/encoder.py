"""Coverage-guided fuzzing of what turns a row into tokens: make fuzz, or make fuzz FUZZ_SECONDS=3600.

A crash is an input, see `test_fuzz.py`, after which something else than a rejected row or tokens came out, or content
that passed for a turn. libFuzzer writes it to failures/, where `test_fuzz.py` replays it ever after.
"""

import json
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["tokenclean_ray"]):
    from test_fuzz import FAILURES, SHAPES, check
    from turns import ENCODERS


def write_seeds(folder: Path) -> None:
    """A row of every shape, and of every format as a line, for every template."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in range(len(ENCODERS)):
        for shape, row in enumerate(SHAPES, 1):
            (folder / f"line-{name}-{shape}").write_bytes(bytes([name, 0]) + json.dumps(row).encode())
            (folder / f"shape-{name}-{shape}").write_bytes(bytes([name, shape]) + b"q\xffa\xffadd\xffx")


def write_dictionary(file: Path) -> None:
    """What mutations may put in: markers, and the words that rows are made of."""
    words = {marker for _, markers in ENCODERS.values() for marker in markers}
    words |= {
        '"role": "',
        '"content": "',
        '"tool_calls": [',
        "\\ud800",
        "\\u0000",
        "null",
        '"assistant"',
        '"tool"',
        "{}",
        "[]",
    }
    file.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in word.encode()) + '"\n' for word in sorted(words)))


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    write_seeds(corpus)
    write_dictionary(corpus.parent / "dictionary")
    options = [f"-dict={corpus.parent / 'dictionary'}", f"-artifact_prefix={FAILURES}/", "-max_len=2000"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], check)
    atheris.Fuzz()
