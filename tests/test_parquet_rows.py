"""Values of Parquet columns as a row of JSON would have them."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenclean_ray.parquet_rows import open_parquet, table_values
from tokenclean_ray.schema import RowError

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, None], "say": 'a "b"\n'}}}
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"a": "here"}}}
QUESTIONS = [
    {"role": "user", "content": said, "calls": None} for said in ('say "two"', [{"type": "text", "text": "x"}])
]
ANSWER = {"role": "assistant", "content": None, "calls": [ADD, LOOK]}
ROWS = [
    {"id": 7, "messages": [QUESTIONS[0], ANSWER], "meta": {"n": [1]}},
    {"id": "b", "messages": [QUESTIONS[1]], "meta": {"n": ["x", True]}},
]
JSON, TEXT = datasets.Json(), datasets.Value("string")
TURN = {"role": TEXT, "content": JSON, "calls": datasets.List(JSON)}


def values_of(path):
    with open(path, "rb") as file:
        return table_values(open_parquet(file).read())


@pytest.mark.parametrize(
    "features",
    [
        {"id": JSON, "messages": datasets.List(JSON), "meta": JSON},
        {"id": JSON, "messages": datasets.List(TURN), "meta": {"n": JSON}},
        {"id": JSON, "messages": datasets.LargeList(TURN), "meta": {"n": datasets.List(JSON)}},
    ],
)
def test_json_that_datasets_writes_for_values_of_several_types(tmp_path, features):
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS, features=datasets.Features(features)).to_parquet(path)
    assert values_of(path) == ROWS


def test_json_in_a_map_and_by_other_writers(tmp_path):
    table = pa.table(
        {
            "meta": pa.MapArray.from_arrays([0, 2], ["a", "b"], pa.array(["[1]", None], pa.json_())),
            "id": pa.array(["3"], pa.json_()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet", store_schema=False)
    assert values_of(tmp_path / "rows.parquet") == [{"meta": {"a": [1], "b": None}, "id": 3}]


def test_json_that_is_none_is_told_of_by_its_row():
    rows = table_values(pa.table({"id": pa.array(["[1", "2", "[" * 200 + "]" * 200], pa.json_())}))
    assert [row.reason if isinstance(row, RowError) else row for row in rows] == [
        "a value cannot be read",
        {"id": 2},
        "a value cannot be read",
    ]


def test_text_that_looks_like_json_stays_text():
    row = {"id": "7", "messages": [{"content": json.dumps(ADD)}]}
    assert table_values(pa.Table.from_pylist([row])) == [row]
