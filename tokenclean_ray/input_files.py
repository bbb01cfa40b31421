"""Paths, folders, globs and datasets of the hub → input files, the same ones on any machine."""

import glob
import os
import re
from collections.abc import Iterable
from typing import Any

from tokenclean_ray.errors import UserError, nearest, redact
from tokenclean_ray.json_text import COMPRESSIONS, TEXT_SUFFIXES
from tokenclean_ray.storage import absolute, failures, filesystem, is_local

METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of datasets, beside rows
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
# how `datasets` reads what is not read here, by the end of a name
OTHERS = {".arrow": "load_from_disk({folder!r})", ".csv": "Dataset.from_csv({file!r})"}


def list_files(paths: Iterable[str], key: str = "") -> list[tuple[str, str]]:
    """(absolute URL, label) of every input file, each once, sorted by label.

    Args:
        key: of the config, that gives the paths; for errors.

    Raises:
        UserError: a path that matches nothing or a file of an unknown kind.
    """
    found: dict[str, str] = {}
    for path in paths:
        for url, label in _match(path, f"{key} {path}".strip()):
            # names of other encodings have bytes that are no text, of which rows could not tell
            found.setdefault(url, os.fsencode(label).decode("utf-8", "backslashreplace"))
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def _match(path: str, named: str) -> list[tuple[str, str]]:
    # hf://datasets/… and s3://… keep their scheme; a local path is shown as the user wrote it
    fs, root = filesystem(absolute(path), named)
    try:
        found = _found(fs, root, path)
        files = [f for f in found if _is_data(f)]
        wrong = "" if files else _nothing_found(fs, root, path) + _as_parquet(fs, found)
    except failures(ImportError, ValueError) as error:
        raise UserError(f"{named}: {error}") from error
    if wrong:
        raise UserError(f"{named}{wrong}")
    if is_local(fs) and (odd := [f for f in files if not os.path.isfile(f)]):
        raise UserError(f"{named}: {odd[0]} is a broken link, a pipe or the like: mend or leave it out")
    if "://" in path:
        return [(url, redact(url)) for url in map(fs.unstrip_protocol, files)]
    return [(f, f if os.path.isabs(os.path.expanduser(path)) else os.path.relpath(f)) for f in files]


def _found(fs: Any, root: str, path: str) -> list[str]:
    """What a path, a folder or a glob stands for, hidden files left out; `root`: the path as the filesystem has it."""
    if _is_glob(path) and not fs.exists(root):
        if is_local(fs):  # relative to this folder, whose own name may look like a glob
            found = glob.glob(os.path.expanduser(path).removeprefix("file://"), recursive=True)
            files = [os.path.abspath(f) for f in found if not os.path.isdir(f)]
        else:
            kinds = fs.glob(root, detail=True)
            files = [f for f in kinds if kinds[f]["type"] != "directory"]
        return [f for f in files if not _hidden(f.rpartition("/")[2])]
    if fs.isdir(root):
        files = _walk(root) if is_local(fs) else fs.find(root)
        return [f for f in files if not _hidden(f[len(root) :])]
    return [root] if fs.exists(root) or (is_local(fs) and os.path.islink(root)) else []


def _walk(root: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # fsspec passes over a folder that it cannot list

    found, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            inner.clear()
            continue
        seen.add(real)
        found += [os.path.join(folder, name) for name in names]
    return found


def _nothing_found(fs: Any, root: str, path: str) -> str:
    if fs.isfile(root):
        return f": unknown kind of file; known are {', '.join(SUFFIXES)}, also .gz, .zst"
    if _is_glob(path) or fs.exists(root):
        return f" matches no file that ends in {', '.join(SUFFIXES)} (also .gz, .zst)"
    folder, _, name = root.rpartition("/")
    names = [f.rpartition("/")[2] for f in fs.ls(folder, detail=False)] if fs.isdir(folder) else []
    of_hub = not names and not _is_data(path) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
    return f" does not exist{nearest(name, names)}" + (f"; on the hub? hf://datasets/{path}" if of_hub else "")


def _as_parquet(fs: Any, found: list[str]) -> str:
    for file in sorted(found, key=lambda file: "train" not in file):  # of several splits the one that is trained on
        if reader := OTHERS.get(os.path.splitext(file)[1]):
            named = file if is_local(fs) else redact(fs.unstrip_protocol(file))
            rows = reader.format(folder=os.path.dirname(named), file=named)
            return f"; in Python datasets.{rows}.to_parquet('rows.parquet') writes one"
    return ""


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _hidden(relative: str) -> bool:
    return any(step.startswith((".", "_")) for step in relative.strip("/").split("/"))


def _is_data(url: str) -> bool:
    if url.rpartition("/")[2] in METADATA:
        return False
    if url.endswith(".parquet"):
        return True
    for suffix in COMPRESSIONS:
        url = url.removesuffix(suffix)
    return url.endswith(TEXT_SUFFIXES)
