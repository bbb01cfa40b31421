"""Where the stages' work runs, and that its results and errors are the same there. What they compute: test_rounds."""

import os
import re
import threading

import pytest
import ray
from conftest import run_python
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import OutOfDiskError, RayActorError

from tokenclean_ray import workers
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Damaged
from tokenclean_ray.storage import AT_ONCE
from tokenclean_ray.workers import (
    FEW_PARTS,
    FEW_READS,
    connect,
    each,
    few_blocks,
    map_batches,
    map_each,
    read_each,
    results,
)

pytestmark = pytest.mark.usefixtures("ray_session")
FEW, MANY = FEW_PARTS, FEW_PARTS + 1


def run(items, work):
    return list(map_each(items, work))


@pytest.mark.parametrize(("each_of", "limit"), [(map_each, FEW_PARTS), (read_each, FEW_READS)])
def test_few_parts_are_work_for_the_driver_and_more_for_the_cluster(each_of, limit):
    def work(item):
        return [{"item": item, "process": os.getpid()}]

    few, many = (list(each_of(list(range(count)), work)) for count in (limit, limit + 1))
    assert {result["process"] for result in few} == {os.getpid()}
    assert os.getpid() not in {result["process"] for result in many}
    for found, count in ((few, limit), (many, limit + 1)):
        assert sorted(result["item"] for result in found) == list(range(count))
    assert list(each_of([], work)) == []


def test_reads_wait_side_by_side():
    together = threading.Barrier(AT_ONCE, timeout=60)

    def read(item):
        together.wait()  # broken where the items are read one after the other
        return [{"item": item}]

    count = AT_ONCE * few_blocks()
    assert len(list(read_each(list(range(count)), read))) == count


@pytest.mark.parametrize("count", [FEW, MANY])
def test_errors_keep_their_type_and_what_is_damaged_is_named_together(count):
    def damaged(item):
        if item < 2:
            raise Damaged({f"part-{item}": "cut short"})
        return []

    def refused(item):
        raise UserError("what to change")

    def full(item):
        raise OSError(28, "No space left on device")

    with pytest.raises(Damaged) as error:
        run(list(range(count)), damaged)
    assert set(error.value.files) == {"part-0", "part-1"}
    with pytest.raises(UserError, match=r"^what to change$"):
        run(list(range(count)), refused)
    with pytest.raises(UserError, match="No space left"):
        run(list(range(count)), full)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RayActorError(), "workers keep dying .*: if for lack of memory, lower score.batch_tokens"),
        (OutOfDiskError(), "Ray failed .*the local disk's utilization is over capacity.*; the same command goes on"),
        (ExecutionTimeoutError("no progress"), "Ray failed .*; the same command goes on"),
    ],
)
def test_what_fails_in_ray_is_told_in_one_line(monkeypatch, error, expected):
    def broken(*_):
        raise error

    monkeypatch.setattr(workers, "_on_cluster", broken)
    with pytest.raises(UserError, match=rf"^{expected}[^\n]*$"):
        run(list(range(MANY)), lambda item: [])


def test_a_part_may_take_as_long_as_it_takes():
    connect()
    assert ray.data.DataContext.get_current().execution_no_progress_timeout_s == -1


JOIN = """
import os
from tokenclean_ray.errors import UserError
from tokenclean_ray.workers import connect
for address, mode in (("http://127.0.0.1:8265", "disabled"), ("127.0.0.1:6399", "token")):
    os.environ |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": mode}
    try:
        connect()
    except UserError as error:
        print(error)
"""


def test_a_cluster_that_cannot_be_joined(tmp_path):
    address, token = run_python(JOIN, HOME=str(tmp_path)).splitlines()  # where a token may lie
    assert re.fullmatch(r"the Ray cluster cannot be joined: .*8265.*", address)
    assert re.fullmatch(r"the Ray cluster cannot be joined: .*[Tt]oken.*", token)


@pytest.mark.parametrize("at_once", [1, 3])
def test_items_that_share_a_block_fail_each_for_itself(at_once):
    """As they do where there are more of them than `MAX_BLOCKS`."""

    def damaged(item):
        if item % 4 == 3:
            raise Damaged({f"part-{item}": "cut short"})
        return [{"item": item}]

    def refused(item):
        if item == 5:
            raise UserError("what to change")
        return [{"item": item}]

    def run_in_blocks(work):
        return list(results(map_batches(list(range(9)), each(work, at_once), blocks=2)))

    with pytest.raises(Damaged) as error:
        run_in_blocks(damaged)
    assert set(error.value.files) == {"part-3", "part-7"}
    with pytest.raises(UserError, match=r"^what to change$"):
        run_in_blocks(refused)
    assert len(run_in_blocks(lambda item: [{"item": item}])) == 9
