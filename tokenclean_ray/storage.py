"""Files on a disk or in an object store, by any URL that fsspec knows. What a run keeps there: `layout`."""

import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from tokenclean_ray.errors import UserError

LOCAL = {"file", "local"}
AHEAD = 1 << 18  # bytes that reading a part of a file may fetch beyond it
ENDPOINT = "AWS_ENDPOINT_URL"  # what libraries read
AT_ONCE = 16  # requests of one process
FAILURES = {
    "botocore.exceptions": "BotoCoreError",
    "aiohttp": "ClientError",
    "gcsfs.retry": "HttpError",
    "httpx": "HTTPError",
    "httpx2": "HTTPError",  # of huggingface_hub
}


def use_endpoint(url: str | None) -> None:
    """Take s3:// of this process to be at another server than Amazon's; None leaves it as the environment has it."""
    if url:
        os.environ[ENDPOINT] = url


def failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What a store or the hub raises that still fails after its own retries: OSError, and what clients let through; and
    `more`."""
    return (
        OSError,
        *more,
        *(getattr(sys.modules[name], error) for name, error in FAILURES.items() if name in sys.modules),
    )


def failure(error: BaseException) -> str:
    """One line that says what failed."""
    *_, last = "", *str(error).strip().splitlines()
    return f"{type(error).__name__}: {last}" if last else type(error).__name__


def side_by_side(function: Callable[[Any], Any], items: Iterable[Any], at_once: int = AT_ONCE) -> Iterator[Any]:
    """What a function gives for each, in order; so many at once, since a store answers after a while."""
    if at_once == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(at_once) as pool:
        ahead: deque[Future[Any]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == at_once:
                yield ahead.popleft().result()
        yield from (found.result() for found in ahead)


def absolute(url: str) -> str:
    """A local path made absolute, because Ray workers run in another folder; other URLs without a slash at their end,
    since `//` is another place of an object store."""
    return url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))


def filesystem(url: str, named: str = "") -> tuple[Any, str]:
    """A URL's filesystem, and its path there.

    Args:
        named: what errors call it; the URL itself where that is empty.

    Raises:
        UserError: a package is missing, or there is no such scheme.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{named or url}: {error}, on every node") from error  # fsspec names the package
    except ValueError as error:
        raise UserError(f"{named or url}: {error}") from error


def open_stretch(url: str) -> Any:
    """A file to read parts of: of an object store `AHEAD` bytes beyond are fetched, by default 50 MB."""
    fs, where = filesystem(url)
    return fs.open(where, "rb", block_size=AHEAD)


def copy_once(fs: Any, files: dict[str, str], folder: Path) -> None:
    """Copy files of an object store to a folder of this machine, if it is not there; many at once.

    Args:
        files: name in the folder → path in the store; the folder's name must tell their contents.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # a node's processes begin together, and one copy is enough
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
                fs.get(list(files.values()), [os.path.join(partial, name) for name in files])
                try:
                    os.rename(partial, folder)
                except OSError:
                    if not folder.is_dir():  # it is where another node has the same folder, by a network without locks
                        raise
                else:
                    os.makedirs(partial)  # for the context manager to remove


def protocols(fs: Any) -> set[str]:
    """The names that a filesystem goes by in URLs."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def is_local(fs: Any) -> bool:
    """Whether an fsspec filesystem is this machine's own."""
    return not LOCAL.isdisjoint(protocols(fs))
