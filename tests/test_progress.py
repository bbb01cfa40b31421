"""What a stage says of itself without a terminal."""

import re
import time

from conftest import wait_for

from tokenclean_ray import progress
from tokenclean_ray.progress import Stage, speed


def next_lines(capfd):
    """The first, whenever it comes, and what follows within half a second."""
    first = wait_for(lambda: capfd.readouterr().err)
    time.sleep(0.5)
    return (first + capfd.readouterr().err).splitlines()


def test_lines_as_long_as_there_is_news(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    with Stage("score", 4, 1000) as stage:
        assert len(next_lines(capfd)) == 1  # that it is at work, however little is done yet
        stage.advance(rows=3, tokens=100)
        (line,) = next_lines(capfd)
        assert line.startswith("score      1/4 parts, 3 rows, ")
        began = time.monotonic()
        monkeypatch.setattr(progress, "QUIET_S", 0.2)
        found = next_lines(capfd)
        monkeypatch.setattr(progress, "QUIET_S", 60)
        found += capfd.readouterr().err.splitlines()
        assert 1 <= len(found) <= 1 + (time.monotonic() - began) / 0.2
    assert len(capfd.readouterr().err.splitlines()) == 1  # the last


def test_what_is_known_later_than_the_stage_begins(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    with Stage("train", 0, unit="updates") as stage:
        assert next_lines(capfd)[0].startswith("train      0/? updates, ")
        stage.expect(40, 1000)
        stage.advance(parts=7, tokens=250, note="loss 1.5000")
        (line,) = next_lines(capfd)
        assert re.match(r"train      7/40 updates, loss 1\.5000, [\d,]+ tokens/s, [\d,]+ s left, ", line)


def test_speed_is_that_of_what_is_finished_and_the_time_left_runs_down():
    figures = {"tokens": 500, "tokens_wanted": 2000, "seconds": 10.0, "counted": 10.0}
    assert speed(figures) == ", 50 tokens/s, 30 s left"
    assert speed(figures | {"seconds": 15.0}) == ", 50 tokens/s, 25 s left"
    assert speed(figures | {"seconds": 60.0}) == ", 8 tokens/s, 180 s left"  # slower than it was
    assert speed(figures | {"tokens": 0}) == ""
    assert speed(figures | {"tokens_wanted": 0, "seconds": 60.0}) == ", 50 tokens/s"
    del figures["counted"]  # of an older version's run
    assert speed(figures) == ", 50 tokens/s, 30 s left"
