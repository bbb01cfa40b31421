"""Files by URL: places, copies on this machine, requests side by side. What a run keeps: test_layout."""

import contextlib
import threading
from pathlib import Path

from tokenclean_ray import storage
from tokenclean_ray.storage import absolute, copy_once, side_by_side


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("runs/a") == str(tmp_path / "runs" / "a")
    assert absolute("~/runs") == "/home/me/runs"
    assert absolute("s3://b/c") == absolute("s3://b/c/") == "s3://b/c"


def test_two_nodes_that_share_a_folder_whose_locks_do_not_lock_make_one_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FileLock", lambda _: contextlib.nullcontext())
    both = threading.Barrier(2, timeout=60)

    class Remote:
        def get(self, _, targets):
            for target in targets:
                Path(target).write_text("x")
            both.wait()

    list(side_by_side(lambda _: copy_once(Remote(), {"a": "there/a"}, tmp_path / "copy"), range(2), 2))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["copy", "copy/a"]


def test_waiting_is_side_by_side_and_in_order():
    threads = {at_once: set(side_by_side(lambda _: threading.get_ident(), range(9), at_once)) for at_once in (1, 4)}
    assert threads[1] == {threading.get_ident()}
    assert threading.get_ident() not in threads[4]
    assert list(side_by_side(str, range(9), 4)) == list(side_by_side(str, range(9), 1)) == list("012345678")
