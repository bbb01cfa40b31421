"""Where a run's artifacts live, on a local disk or an object store, and how they are committed.

    RUN/  run.json                      resolved config, versions, model fingerprints, counts, timings
          encoded/part-*.parquet        rows as tokens
          rejected/part-*.parquet       rows that could not be used, and why
          losses/<model>/part-*.parquet
          selections/<name>/threshold.json
          masked/v0001/part-*.parquet   the product; manifest.json is written last
          masked/latest.json            names the newest snapshot

A file appears under its name complete or not at all, and its name does not depend on who wrote it or on which
attempt: what is there is done, and writing it again writes the same bytes. So resume is "which files are missing".
"""

import json
import os
import uuid
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean_ray.config import UserError

PART_SUFFIX = ".parquet"
FOOTER_KEY = b"tokenclean"


def absolute(url: str) -> str:
    """A local path made absolute, because Ray workers run in another folder; other URLs unchanged."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec filesystem. Paths are relative to it, with forward slashes."""

    url: str

    def _locate(self, path: str) -> tuple[Any, str]:
        return fsspec.core.url_to_fs(f"{self.url.rstrip('/')}/{path}".rstrip("/"))

    def part_names(self, folder: str) -> set[str]:
        """The parts that are done in a folder, without their suffix."""
        fs, where = self._locate(folder)
        # another process may have added files since this filesystem object listed the folder
        fs.invalidate_cache()
        if not fs.exists(where):
            return set()
        names = (path.rsplit("/", 1)[-1] for path in fs.ls(where, detail=False))
        return {name.removesuffix(PART_SUFFIX) for name in names if name.endswith(PART_SUFFIX) and name[0] != "."}

    def folders(self, folder: str) -> list[str]:
        """Names of the sub-folders, sorted."""
        fs, where = self._locate(folder)
        fs.invalidate_cache()
        if not fs.exists(where):
            return []
        return sorted(
            e["name"].rstrip("/").rsplit("/", 1)[-1] for e in fs.ls(where, detail=True) if e["type"] == "directory"
        )

    def write_bytes(self, path: str, data: bytes) -> None:
        """Commit a file: it appears complete or not at all."""
        fs, where = self._locate(path)
        if fs.protocol != "file" and "file" not in fs.protocol:
            fs.pipe_file(where, data)  # a PUT is atomic
            return
        os.makedirs(os.path.dirname(where), exist_ok=True)
        temporary = f"{os.path.dirname(where)}/.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, where)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def checksum(self, path: str) -> str:
        """What changes when a file is written again: its size and time, or an object store's tag."""
        fs, where = self._locate(path)
        return str(fs.checksum(where))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        fs, where = self._locate(path)
        return int(fs.size(where))

    def put_folder(self, local: str, path: str) -> None:
        """Copy a local folder's files; not atomic: write what marks them complete afterwards."""
        fs, where = self._locate(path)
        for name in sorted(os.listdir(local)):
            fs.makedirs(where, exist_ok=True)
            fs.put_file(os.path.join(local, name), f"{where}/{name}")

    def write_json(self, path: str, value: Any) -> None:
        """Commit a JSON file."""
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, path: str) -> Any | None:
        """The value, or None where the file is not there."""
        fs, where = self._locate(path)
        try:
            with fs.open(where, "rb") as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self.url}/{path} is not valid JSON: delete it and run the same command again") from error

    def read_lines(self, path: str) -> list[Any]:
        """The values of a JSON-lines file; none where it is not there."""
        fs, where = self._locate(path)
        try:
            with fs.open(where, "rb") as file:
                return [json.loads(line) for line in file]
        except FileNotFoundError:
            return []

    def write_part(self, folder: str, part: str, table: pa.Table, summary: dict[str, Any]) -> None:
        """Commit a part's file, its summary in the footer so that a resumed run need not read the rows."""
        footer = {FOOTER_KEY: json.dumps({"part": part, **summary})}
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(footer),
            sink,
            compression="zstd",
            compression_level=1,
            write_page_checksum=True,
        )
        self.write_bytes(f"{folder}/{part}{PART_SUFFIX}", sink.getvalue().to_pybytes())

    def read_part(self, folder: str, part: str, columns: list[str] | None = None) -> pa.Table:
        """A part's table.

        Raises:
            UserError: the file is unreadable, or belongs to another part.
        """
        with self._open_part(folder, part) as file:
            parquet = self._parquet(file, folder, part)
            try:
                return parquet.read(columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(folder, part, error) from error

    def read_summary(self, folder: str, part: str) -> dict[str, Any]:
        """What `write_part` was given as summary; reads the footer alone."""
        with self._open_part(folder, part) as file:
            return json.loads(self._parquet(file, folder, part).schema_arrow.metadata[FOOTER_KEY])

    def _open_part(self, folder: str, part: str) -> Any:
        fs, where = self._locate(f"{folder}/{part}{PART_SUFFIX}")
        return fs.open(where, "rb")

    def _parquet(self, file: Any, folder: str, part: str) -> pq.ParquetFile:
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            footer = json.loads((parquet.schema_arrow.metadata or {}).get(FOOTER_KEY, b"{}"))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(folder, part, error) from error
        if footer.get("part") != part:
            raise self._damaged(folder, part, "it belongs to another part")
        return parquet

    def _damaged(self, folder: str, part: str, why: object) -> UserError:
        path = f"{self.url}/{folder}/{part}{PART_SUFFIX}"
        return UserError(f"{path} is damaged ({why}): delete it and run the same command again")
