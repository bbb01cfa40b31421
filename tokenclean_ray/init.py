"""`tokenclean init FILE`: a commented run.yaml for some data. It looks at the first rows and names their format."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from tokenclean_ray.errors import UserError
from tokenclean_ray.formats import REQUIRED, ROLES, SENDER, as_role, to_messages, turns_in
from tokenclean_ray.input_files import list_files
from tokenclean_ray.json_text import parsed
from tokenclean_ray.sampling import sample_files
from tokenclean_ray.schema import Raw, RowError, commonest

SEED = 0
# column names in use for the two halves of a row, by format
NAMES = {
    "question": ("question", "query", "prompt", "instruction", "input", "inputs", "problem", "user", "request"),
    "answer": (
        *("response", "output", "completion", "solution", "generated_solution"),
        # beside a solution, an answer is its result alone
        *("answer", "answers", "chosen", "target", "targets", "assistant"),
    ),
}
TALKS = {"conversation", "data", "dialog", "dialogue"}  # whose texts and pairs are turns, not tags or a program's tests
TEST_SPLITS = {"test", "tests", "validation", "valid", "val", "dev", "eval"}
COMMENTS_AT = 34
TEMPLATE = """\
# Run it with: tokenclean clean {out}
# Any key can be replaced on the command line: tokenclean clean {out} select.keep_ratio=0.5
# What it will cost, before it is run: tokenclean estimate {out} --gpu h100
output: {output} # the run folder; also s3:// or gs://
data:
  path: {path} # one or a list of files, folders, globs, or hf://datasets/owner/name
  format: {format} # {found}
  columns: {columns} # expected column: the file's own, e.g. {{messages: dialogue}}
  extra_columns: [] # columns to carry through; id and source always are
  template: chat # the tokenizer's chat template, or tulu, the paper's
  max_length: 2048 # tokens
  on_overflow: truncate # or reject: rows that are longer
model:
  base: {base} # CHANGE: a folder or a hub id; the model that will be trained
  reference: {reference} # CHANGE: the base tuned on clean data, or a LoRA folder; or, instead,
  # under data: warmup: clean.jsonl, a small clean set that a reference is trained on first
select:
  keep_ratio: 0.6 # share of the answer tokens that is kept; 0.3 to 0.7 gave like results in the paper
  scorer: gated_excess_loss # the paper's: excess_loss; others: see the README
  scope: global # or sample: the top share of each row
"""


def write_config(path: str, out: str, base: str, reference: str) -> str:
    """Write a run.yaml; returns what was found in the data.

    Args:
        path: a file, folder or glob, as data.path takes it.
        out: the config's file.

    Raises:
        UserError: `out` is there already, or the data cannot be read.
    """
    target = Path(out)
    if target.exists():
        raise UserError(f"{out} is there already: delete it, or name another file with --out")
    files = list_files([path])
    format, columns, found = recognise(sample_files(files, SEED).rows)
    found += _comment(_not_meant([label for _, label in files]))
    name = Path(path.rstrip("/")).name.partition(".")[0].replace("*", "") or "data"
    values = {"output": f"runs/{name}", "path": path, "columns": columns, "base": base, "reference": reference}
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    values |= {"out": shlex.quote(out), "format": format, "found": found}
    text = ""
    for line in TEMPLATE.splitlines():  # divided before a value that may hold the mark is put in
        value, mark, comment = (piece.format(**values) for piece in line.partition(" # "))
        text += f"{value:<{COMMENTS_AT}}{mark}{comment}\n" if mark else f"{value}\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "x", encoding="utf-8") as file:  # x: another process may have been faster
        file.write(text)
        os.fsync(file.fileno())
    return found


def _not_meant(labels: list[str]) -> str:
    """Files that one may not want: a folder is read whole, as is a dataset of the hub, with its tests and subsets."""
    tests = [label for label in labels if TEST_SPLITS & set(re.split("[^a-z]+", label.lower()))]
    folders = sorted({label.rpartition("/")[0] for label in labels})
    notes = []
    if 0 < len(tests) < len(labels):
        notes.append(f"; {len(tests):,} of {len(labels):,} files look like test splits, as {tests[0]}")
    if len(folders) > 1:
        notes.append(f"; {len(folders):,} folders are read, as {folders[0]}, which may hold the same rows")
    return "".join(notes) + (": name the files to train on in data.path, by a glob" if notes else "")


def recognise(rows: list[Raw]) -> tuple[str, dict[str, str], str]:
    """The format of rows, the columns to rename for it, and both in words, with why other rows do not fit.

    Rows that fit no known format by their own column names are tried by their shape, then by names in use elsewhere.
    """
    usable = [row for row in rows if isinstance(row, dict)]
    # auto comes last, since it is for rows of several formats
    tried = [(f, c, _errors(rows, f, c)) for f, c in [*_guesses(usable), ("auto", {})]]
    format, columns, errors = min(tried, key=lambda one: len(one[2]))
    if len(errors) == len(rows):
        none = f"CHANGE: none of {len(rows):,} sampled rows can be used; {commonest(tried[-1][2])}"
        return "auto", {}, _comment(none)
    kind = "of several formats" if format == "auto" else format
    renamed = "".join(f", {wanted} from {own}" for wanted, own in columns.items())
    others = f"; {commonest(errors)}" if errors else ""
    fitting = len(rows) - len(errors)
    return format, columns, _comment(f"{fitting:,} of {len(rows):,} sampled rows are {kind}{renamed}{others}")


def _guesses(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Formats and renamings worth trying, by the first value of each column that is there."""
    first = {name: value for row in reversed(rows) for name, value in row.items() if value not in (None, [])}
    texts = {name.lower(): name for name, value in first.items() if isinstance(value, str)}
    of_system = next((texts[name] for name in ("system", "system_message", "system_prompt") if name in texts), "system")
    system = {"system": of_system} if of_system != "system" else {}
    halves = [next((texts[n] for n in NAMES[half] if n in texts), None) for half in ("question", "answer")]
    found = [(format, system) for format in REQUIRED]
    for name, value in first.items():
        if name == "rejected" or not _roles(name, value):
            continue
        is_half = isinstance(value, list)  # JSON text would be a text, lists by key are not read
        if is_half and halves[1] and _asks(name, rows):  # the answer to a conversation stands beside it
            found.insert(0, ("prompt_completion", system | _renamed(prompt=name, completion=halves[1])))
        elif is_half and isinstance(first.get("prompt"), list):  # as in preferences, these are the answers to it
            found.append(("prompt_completion", {"completion": name}))
        else:
            found.append(("messages", system | {"messages": name}))
    context = next((texts[name] for name in ("input", "context") if name in texts), None)
    if halves[1] and "instruction" in texts and context:  # Dolly: a question without its context is another
        renamed = _renamed(instruction=texts["instruction"], input=context, output=halves[1])
        found.append(("alpaca", system | renamed))
    if halves[0] and halves[1] and halves[0] != halves[1]:
        found.append(("question_answer", system | {"question": halves[0], "answer": halves[1]}))
    return found


def _asks(name: str, rows: list[dict[str, Any]]) -> bool:
    """Whether most conversations in a column end without an answer: of many, some are cut off."""
    ends = [roles[-1] == "assistant" for row in rows if (roles := _roles(name, row.get(name)))]
    return 2 * sum(ends) < len(ends)


def _roles(name: str, value: Any) -> list[str | None]:
    """Of the turns that a column holds, as `ROLES` has them; empty where it holds something else."""
    value = parsed(value)
    turn = value[0] if isinstance(value, list) and value else value
    if name.lower() not in TALKS and not (isinstance(turn, dict) and turn.keys() & SENDER):
        return []
    try:
        turns = turns_in(value, name, {})
    except RowError:
        return []
    if not all(isinstance(turn, dict) for turn in turns):
        return []
    roles = [ROLES.get(as_role(str(turn.get("role") or turn.get("from")))) for turn in turns]
    return roles if roles[0] else []


def _renamed(**columns: str) -> dict[str, str]:
    """Expected columns that have another name."""
    return {wanted: own for wanted, own in columns.items() if wanted != own}


def _errors(rows: list[Raw], format: str, columns: dict[str, str]) -> list[RowError]:
    """Why rows cannot be read in this format, of those that cannot."""
    found = []
    for row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            to_messages(row, format, columns)
        except RowError as error:
            found.append(error)
    return found


def _comment(text: str) -> str:
    """One line, whatever the data's column names hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
