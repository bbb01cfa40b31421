"""The columns that are carried through: their values arrive as they were, in a type that holds all of them. And where
two models' cuts agree."""

import json
import math
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer, write_rows, write_scored

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Data, Select
from tokenclean_ray.layout import Store
from tokenclean_ray.parts import Splits, agreeing_tokens, carried_types, encode_part, publish_part
from tokenclean_ray.selection import Cut, order_key
from tokenclean_ray.source import plan_file, read_parts, work_items

EVERYTHING = Select(scorer="random", keep_ratio=1.0)
WANTED = ["id", "x"]


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(make_tokenizer(), "chat", 64, "truncate")


def test_turns_by_other_keys(tmp_path, encoder):
    turns = [{"role": role, "text": "the fox"} for role in ("user", "assistant")]
    file, store = str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])), Store(str(tmp_path / "run"))
    (item,) = work_items(plan_file(file, file, 400, "e"))
    ((part, rows),) = read_parts(item, 400)
    (found,) = encode_part(store, part, rows, encoder, Data(turn_keys={"content": "text"}), WANTED, Splits())
    assert (found["rows"], found["rejected"]) == (1, {})


def carried(folder, encoder, files) -> tuple[dict[str, str], list[dict]]:
    """Files → the types of what is published, and the rows in order."""
    store, parts = Store(str(folder / "run")), []
    for file in files:
        for item in work_items(plan_file(file, file, 400, "e")):
            for part, rows in read_parts(item, 400):
                parts += encode_part(store, part, rows, encoder, Data(), WANTED, Splits())
    assert not any(part["rejected"] for part in parts)
    kinds: dict[str, set[str]] = {}
    for part in parts:
        for column, seen in part["kinds"].items():
            kinds.setdefault(column, set()).update(seen)
    types = carried_types(kinds, WANTED)
    for part in parts:
        publish_part(store, "masked", part["part"], {}, EVERYTHING, None, types)
    tables = [store.read_part("masked", part["part"]) for part in parts]
    assert len(tables) > 1
    assert len({table.schema.remove_metadata() for table in tables}) == 1
    table = pa.concat_tables(tables)
    return {name: str(table.schema.field(name).type) for name in table.column_names}, table.to_pylist()


def json_file(folder, values) -> str:
    rows = [{"question": "the fox", "answer": "the dog", "x": value} for value in values]
    return str(write_rows(folder / "rows.jsonl", rows))


LAST = 30  # rows of the first kind before the others: no sample of a part would have seen them


@pytest.mark.parametrize(
    ("first", "last", "kind", "published"),
    [
        (1, None, "int64", None),
        (1, 2**60 + 1, "int64", 2**60 + 1),
        (1, 4.5, "double", 4.5),
        (0.1, 5, "double", 5.0),
        (0.1, math.inf, "double", math.inf),
        (0.1, 2**60 + 1, "string", str(2**60 + 1)),  # a float would cut it
        (1, 2**70, "string", str(2**70)),
        (1, "2", "string", "2"),
        (1, "x", "string", "x"),
        (True, False, "bool", False),
        (True, 1, "string", "1"),
        ("a", ' "quoted" \u2028 é\n', "string", ' "quoted" \u2028 é\n'),
        ("a", "", "string", ""),
        ("a", "null", "string", "null"),
        ("a", {"b": [1, "é"]}, "string", '{"b": [1, "é"]}'),
        (None, None, "string", None),
    ],
)
def test_no_value_is_cut_or_rejected_for_those_of_other_rows(tmp_path, encoder, first, last, kind, published):
    types, rows = carried(tmp_path, encoder, [json_file(tmp_path, [first] * LAST + [last])])
    assert types["x"] == kind
    assert list(types) == ["row", "source", "x", "input_ids", "labels"]  # no id, since no row has one
    assert rows[-1]["x"] == published
    alone = json.dumps(first) if kind == "string" and not isinstance(first, str) else first
    assert [row["x"] for row in rows[:-1]] == [None if first is None else alone] * LAST


def test_of_several_files_each_part_is_published_in_the_type_of_all(tmp_path, encoder):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    row = {"question": "the fox", "answer": "the dog"}
    write_rows(one, [row | {"id": n} for n in range(20)])
    write_rows(other, [row | {"id": f"b{n}"} for n in range(20)])
    types, rows = carried(tmp_path, encoder, [str(one), str(other)])
    assert types["id"] == "string"
    assert [row["id"] for row in rows] == [str(n) for n in range(20)] + [f"b{n}" for n in range(20)]


@pytest.mark.parametrize(
    ("values", "kind", "published"),
    [
        (np.arange(20, dtype=np.uint64) + 2**63, "string", [str(2**63 + n) for n in range(20)]),
        (np.arange(20, dtype=np.float32), "double", [float(n) for n in range(20)]),
        ([datetime(2026, 1, 1, tzinfo=UTC)] * 20, "string", ["2026-01-01 00:00:00+00:00"] * 20),
        ([{"a": 1}] * 20, "string", ['{"a": 1}'] * 20),
    ],
)
def test_values_of_parquet_files(tmp_path, encoder, values, kind, published):
    table = pa.table({"question": ["the fox"] * 20, "answer": ["the dog"] * 20, "x": pa.array(values)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    types, rows = carried(tmp_path, encoder, [str(tmp_path / "rows.parquet")])
    assert types["x"] == kind
    assert [row["x"] for row in rows] == published


def test_two_cuts_agree_on_tokens_that_both_keep_or_both_drop(tmp_path):
    store, random = Store(str(tmp_path)), np.random.default_rng(0)
    masks = [[False, *(random.random(9) < 0.6).tolist()] for _ in range(20)]
    losses = {name: random.random((20, 10)).astype(np.float32) for name in ("base", "one", "other")}
    write_scored(store, "part-a", [[5] * 10] * 20, masks, **{name: list(values) for name, values in losses.items()})
    limits = {"one": np.float32(0.1), "other": np.float32(-0.3)}

    def side(name):
        folders = {"base": "losses/base", "reference": f"losses/{name}"}
        return folders, {"": Cut(int(order_key(limits[name][None])[0]), 0)}

    agreeing = 0
    for n, mask in enumerate(masks):
        for t in np.flatnonzero(mask):
            kept = [losses["base"][n, t] - losses[name][n, t] >= limit for name, limit in limits.items()]
            agreeing += kept[0] == kept[1]
    found = agreeing_tokens(store, "part-a", side("one"), side("other"), Select(scorer="excess_loss"))
    assert 0.55 * np.sum(masks) < found == agreeing < np.sum(masks)
