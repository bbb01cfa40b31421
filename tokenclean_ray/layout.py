"""Where a run's artifacts live, on a local disk or an object store, and how they are committed.

    RUN/  run.json                      resolved config, versions, model fingerprints, counts, timings
          encoded/part-*.parquet        rows as tokens
          rejected/part-*.parquet       rows that could not be used, and why
          losses/<model>/part-*.parquet
          selections/<name>/threshold.json
          masked/v0001/part-*.parquet   the product; claim.json is written first, changes.json then, manifest.json last
          masked/latest.json            names the newest snapshot
          lock/00000001.json            who is at work here, see `lock`

A file appears under its name complete or not at all, and its name does not depend on who wrote it or on which
attempt: what is there is done, and writing it again writes the same bytes. So resume is "which files are missing".
"""

import contextlib
import errno
import io
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import tokenize

from tokenclean_ray.errors import UserError, redact
from tokenclean_ray.schema import FLOATS, check_plain
from tokenclean_ray.storage import LOCAL, absolute, filesystem, is_local, protocols

PART_SUFFIX = ".parquet"
CREATES_ATOMICALLY = LOCAL | {"s3", "s3a", "gs", "gcs"}  # fsspec filesystems that create a file only if there is none
FOOTER_BYTES = 1 << 16  # of most files
FOOTER_KEY = b"tokenclean"
CHECKSUM_KEY = b"tokenclean.crc32"
TRAINED = "tokenclean.json"  # the last file of models/<name>/: what was trained, and how
UNPACKED = "working_dir_files"  # Ray's folder for what `ray job submit --working-dir` sends
GOES_ON = "the same command goes on where this run ended"
PARTS_AT_ONCE = 4  # of one process; a node has one for each core, and stores slow down who asks too often
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class Damaged(UserError):
    """Files of a run folder that are not what was written under their names."""

    def __init__(self, files: dict[str, str]) -> None:
        """`files`: path in the run folder → a sentence that gives its URL and what is wrong."""
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        super().__init__(f"{next(iter(files.values()))}{more}: delete it and run the same command again")
        self.files = files


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a file of the run folder."""
    # losses have no equal values, but equal bytes: a fifth smaller, and written three times as fast
    floats = [name for name, kind in zip(table.column_names, table.schema.types, strict=True) if kind == FLOATS]
    split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in floats}
    how: dict[str, Any] = {"use_dictionary": False, "column_encoding": split} if split else {}
    sink = pa.BufferOutputStream()
    how |= {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}
    with pq.ParquetWriter(sink, table.schema, **how) as writer:
        if table.num_rows:  # `datasets` reads as many rows at a time as the first row group has, and refuses none
            writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def run_folder(url: str) -> str:
    """A run folder's URL, absolute; raises `UserError` where it would lie in what a job has of its --working-dir."""
    is_relative = "://" not in url and not os.path.isabs(os.path.expanduser(url))
    if is_relative and UNPACKED in os.getcwd().split(os.sep):
        raise UserError(
            f"output {url} is relative, and a submitted job's folder goes when the job does: give an absolute path "
            "that all nodes share, or s3:// or gs://"
        )
    return absolute(url)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {redact(key): _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _write_then(put: Callable[[str, str], None], where: str, data: bytes) -> None:
    """Write a file whole under a temporary name, then put it in its place."""
    os.makedirs(os.path.dirname(where), exist_ok=True)
    temporary = f"{os.path.dirname(where)}/.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put(temporary, where)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _link(temporary: str, where: str) -> None:
    """Give a file its name where there is none; unlike a rename, a link never replaces."""
    try:
        os.link(temporary, where)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # a filesystem without links: for a moment a reader may find the file half written
        with open(temporary, "rb") as source, open(where, "xb") as target:
            try:
                target.write(source.read())
                target.flush()
                os.fsync(target.fileno())
            except OSError:
                os.remove(where)
                raise


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec filesystem. Paths are relative to it, with forward slashes."""

    url: str

    def _locate(self, path: str) -> tuple[Any, str]:
        return filesystem(f"{self.url.rstrip('/')}/{path}".rstrip("/"))

    @property
    def at_once(self) -> int:
        """Parts that a process should be at side by side, since a store's answers take longer than their tokens do."""
        return 1 if is_local(self._locate("")[0]) else PARTS_AT_ONCE

    @property
    def creates_atomically(self) -> bool:
        """Whether `create_bytes` holds when two processes call it at once."""
        return not CREATES_ATOMICALLY.isdisjoint(protocols(self._locate("")[0]))

    def names(self, folder: str) -> list[str]:
        """Names of what lies in a folder, sorted; hidden files left out."""
        fs, where = self._locate(folder)
        # another process may have added files since this filesystem object listed the folder
        fs.invalidate_cache()
        if not fs.exists(where):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(where, detail=False))
        return sorted(name for name in names if name[0] != ".")

    def part_names(self, folder: str) -> set[str]:
        """The parts that are done in a folder, without their suffix."""
        return {name.removesuffix(PART_SUFFIX) for name in self.names(folder) if name.endswith(PART_SUFFIX)}

    def write_bytes(self, path: str, data: bytes) -> None:
        """Commit a file: it appears complete or not at all."""
        fs, where = self._locate(path)
        if is_local(fs):
            _write_then(os.replace, where, data)
        else:
            fs.pipe_file(where, data)  # a PUT is atomic

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Commit a file where there is none; False where there is one with other contents, which stays as it is."""
        fs, where = self._locate(path)
        try:
            if is_local(fs):
                _write_then(_link, where, data)
            else:
                fs.pipe_file(where, data, mode="create")
        except OSError:  # FileExistsError, or what a store makes of a request that it had carried out before its answer
            fs.invalidate_cache()
            if not fs.exists(where):
                raise
        return bool(fs.cat_file(where) == data)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        fs, where = self._locate(path)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(where)

    def checksums(self, folder: str, names: list[str]) -> list[str]:
        """What changes when some files of a folder are written again: size and time, or an object store's tag."""
        fs, where = self._locate(folder)
        if is_local(fs):  # fsspec's is of everything it knows, permissions and the number of links included
            found = (os.stat(f"{where}/{name}") for name in names)
            return [f"{one.st_size}-{one.st_mtime_ns}" for one in found]
        fs.invalidate_cache()
        listed = {info["name"].rpartition("/")[2]: info for info in fs.ls(where, detail=True)}
        # s3fs's own looks through the whole listing for each
        return [str(listed[name].get("ETag") or tokenize(listed[name])) for name in names]

    def size(self, path: str) -> int:
        """Bytes of a file."""
        fs, where = self._locate(path)
        return int(fs.size(where))

    def put_folder(self, local: str, path: str) -> None:
        """Copy a local folder's files, at any depth; not atomic: write what marks them complete afterwards."""
        fs, where = self._locate(path)
        for file in sorted(Path(local).rglob("*")):
            if file.is_file():
                copy = f"{where}/{file.relative_to(local).as_posix()}"
                fs.makedirs(copy.rpartition("/")[0], exist_ok=True)
                fs.put_file(str(file), copy)

    def write_json(self, path: str, value: Any) -> None:
        """Commit a JSON file."""
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_record(self, path: str, value: Any) -> None:
        """Commit a JSON file that tells people of a run, its configuration included; secrets are left out."""
        self.write_json(path, _without_secrets(value))

    def read_json(self, path: str) -> Any | None:
        """The value, or None where the file is not there."""
        fs, where = self._locate(path)
        try:
            return json.loads(fs.cat_file(where))  # one request: a file that is replaced meanwhile is read whole
        except (FileNotFoundError, NotADirectoryError):  # the latter of a file that is taken for a run folder
            return None
        except ValueError as error:
            raise self.damaged(path, "not valid JSON") from error

    def write_part(self, folder: str, part: str, table: pa.Table, summary: dict[str, Any]) -> None:
        """Commit a part's file, its summary in the footer so that a resumed run need not read the rows."""
        footer = json.dumps({"part": part, "folder": folder, **summary}).encode()
        # Parquet's page checksums do not cover the footer
        table = table.replace_schema_metadata({FOOTER_KEY: footer, CHECKSUM_KEY: str(zlib.crc32(footer))})
        self.write_bytes(f"{folder}/{part}{PART_SUFFIX}", parquet_bytes(table))

    def has_part(self, folder: str, part: str) -> bool:
        """Whether a part is done; for one that may have become so since its folder was listed.

        Of an object store by one request, where `exists` would also look for a folder of that name.

        Raises:
            Damaged: see `read_part`.
        """
        try:
            self.read_summary(folder, part)
        except FileNotFoundError:
            return False
        return True

    def read_part(self, folder: str, part: str, columns: list[str] | None = None) -> pa.Table:
        """A part's table.

        Raises:
            Damaged: the file is unreadable, or belongs to another part or folder.
            OSError: the storage failed, which says nothing of the file.
        """
        with self._open_part(folder, part) as file:
            parquet, _ = self._parquet(file, folder, part)
            with self._reading(f"{folder}/{part}{PART_SUFFIX}"):
                table = parquet.read(columns=columns)
        if missing := set(columns or ()) - set(table.column_names):
            raise self.damaged(f"{folder}/{part}{PART_SUFFIX}", f"without {', '.join(sorted(missing))}")
        return table

    def read_summary(self, folder: str, part: str) -> dict[str, Any]:
        """What `write_part` was given as summary; reads the footer alone."""
        with self._open_part(folder, part, FOOTER_BYTES) as file:
            return self._parquet(file, folder, part)[1]

    def _open_part(self, folder: str, part: str, last: int = 0) -> Any:
        """A part's file, of an object store in memory by one request; `last`: so many bytes of its end may do."""
        fs, where = self._locate(f"{folder}/{part}{PART_SUFFIX}")
        if is_local(fs):
            return fs.open(where, "rb")
        try:
            data = fs.cat_file(where, start=-last)  # as a range: of a whole file s3fs asks the size first
            if last == len(data) < int.from_bytes(data[-8:-4], "little") + 8:
                data = fs.cat_file(where, start=0)
        except OSError as error:
            if error.errno != errno.EINVAL or fs.size(where):  # that stands for many errors
                raise
            data = b""  # of which there is no range
        return io.BytesIO(data)

    def _parquet(self, file: Any, folder: str, part: str) -> tuple[pq.ParquetFile, dict[str, Any]]:
        path = f"{folder}/{part}{PART_SUFFIX}"
        with self._reading(path):
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            check_plain(parquet.schema_arrow)
            metadata = parquet.schema_arrow.metadata or {}
            footer = json.loads(metadata.get(FOOTER_KEY, b"{}"))
        if footer.get("part") != part:
            raise self.damaged(path, "it belongs to another part")
        if footer.pop("folder", folder) != folder:
            raise self.damaged(path, "it belongs to another folder")
        if metadata.get(CHECKSUM_KEY) != str(zlib.crc32(metadata[FOOTER_KEY])).encode():
            raise self.damaged(path, "the checksum of its summary differs")
        return parquet, footer

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """What goes wrong within is the file's fault, but for memory and the storage itself."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            # Arrow's errors for bytes that it cannot read are plain OSErrors without a number
            storage = isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError)
            if storage or isinstance(error, pa.ArrowMemoryError):
                raise
            raise self.damaged(path, error) from error

    def damaged(self, path: str, why: object) -> Damaged:
        """The error that names a file."""
        return Damaged({path: f"{self.url}/{path} is damaged ({' '.join(str(why).split())})"})
