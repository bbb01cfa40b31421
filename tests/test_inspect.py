"""Rows in a terminal: the right ones, readable with and without colours, nothing that a terminal obeys."""

import os
import re
import subprocess

import pytest
from conftest import chat
from test_cli import CONSOLE_SCRIPT
from test_rounds import config_for, masked_rows, some_rows

from tokenclean_ray import rounds
from tokenclean_ray.errors import UserError
from tokenclean_ray.finished import Finished, open_finished
from tokenclean_ray.inspect import show_rows
from tokenclean_ray.tokens import MANY

pytestmark = pytest.mark.usefixtures("ray_session")
COLOURED = re.compile(r"\x1b\[([\d;]*)m([^\x1b]*)")


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_pair):
    rows = [*some_rows(40), chat("evil", "a \x1b[2J\x1b]0;title\x07 b \u202e c\rd [-x-]") | {"source": "s\x1b[31m9"}]
    config = config_for(tmp_path_factory.mktemp("inspect"), model_pair, rows)
    return config.output, rounds.clean(config)


def shown(run, capsys, row=None, source=None, most_dropped=False, count=5):
    show_rows(run[0], row, source, most_dropped, count)
    return capsys.readouterr().out


def test_a_named_row_with_its_dropped_text_marked(run, capsys, tokenizer):
    (part, number), row = sorted(masked_rows(run[1]).items())[3]
    text = shown(run, capsys, f"{part}:{number}")
    head, figures, body = text.split("\n", 2)
    assert head == f"{part}:{number}  {row['source']}"
    kept = sum(label != -100 for label in row["labels"])
    assert figures.startswith(f"{kept} of ")
    assert re.sub(r"\[-|-\]", "", body).rstrip("\n") == tokenizer.decode(row["input_ids"]).rstrip("\n")
    left = tokenizer.decode([label for label in row["labels"] if label != -100])
    answer = re.sub(r"\[-.*?-\]", "", body, flags=re.DOTALL).partition("assistant\n")[2]
    assert answer.rstrip("\n") in (left, left.removesuffix("\n"))


def test_rows_of_a_source_and_the_most_changed(run, capsys):
    heads = [line for line in shown(run, capsys, source="s1", count=4).splitlines() if line.startswith("part-")]
    assert len(heads) == 4
    assert all(head.endswith("  s1") for head in heads)
    found = re.findall(r"kept, ([\d.]+)%", shown(run, capsys, most_dropped=True, count=100))
    assert len(found) == 41
    assert list(map(float, found)) == sorted(map(float, found))


def test_a_source_of_so_many_that_they_are_not_told_apart(run, capsys, monkeypatch):
    monkeypatch.setattr(Finished, "sources", {MANY: (100, 60)})
    assert shown(run, capsys, source="s1", count=1).splitlines()[0].endswith("  s1")
    with pytest.raises(UserError, match="no row of s7 among those read"):
        show_rows(run[0], None, "s7", False, 1)


def test_what_a_terminal_would_obey_is_written_out(run, capsys):
    text = shown(run, capsys, source="s\x1b[31m9")
    assert not set(text) & set("\x1b\x07\r\u202e")
    for written in ("⟨U+001B⟩", "⟨U+0007⟩", "⟨U+202E⟩", "⟨U+000D⟩"):
        assert written in text


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ("3", None, "not of the form PART:ROW"),
        ("part-0:1", None, "the run has no part-0"),
        (None, "s11", "no source s11; did you mean s1?"),
    ],
)
def test_what_is_not_there(run, row, source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        show_rows(run[0], row, source, False, 5)


def test_a_model_whose_tokenizer_changed_since(run):
    finished = open_finished(run[0])
    finished.manifest["tokenizer"] = "other"
    with pytest.raises(UserError, match="has another tokenizer than the run"):
        _ = finished.tokenizer


def test_colours_on_a_terminal_and_none_where_they_are_not_wanted(run):
    command = [CONSOLE_SCRIPT, "inspect", run[0], "-n", "2"]
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    coloured = subprocess.run(command, capture_output=True, text=True, env=plain | {"FORCE_COLOR": "1"}, check=True)
    styles = {style for style, text in COLOURED.findall(coloured.stdout) if text.strip()}
    assert {"32", "9;31"} <= styles
    assert "[-" not in coloured.stdout
    for environment in (plain, plain | {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert "[-" in done.stdout
        assert not {"32", "9;31"} & {style for style, _ in COLOURED.findall(done.stdout)}
