"""The demo's parts: planted noise is what it says, and the shown figures are counts of it."""

import json
import random
import shutil
import subprocess

import numpy as np

from tokenclean_ray import demo


def test_planted_words_are_the_replaced_ones():
    rng = random.Random(0)
    for _ in range(200):
        row = demo._row(rng, demo._shift)
        before = row["messages"][1]["content"].split()
        after = demo._plant(rng, json.loads(json.dumps(row)), demo.LETTERS)
        words = after["messages"][1]["content"].split()
        assert after["planted"] == [a != b for a, b in zip(before, words, strict=True)]


def test_the_command_that_it_shows_can_be_pasted(monkeypatch):
    """Also behind `make demo`, which activates no environment."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert shutil.which("tokenclean") is None
    said = subprocess.run(f"{demo._command()} --version", shell=True, capture_output=True, text=True).stdout
    assert said.startswith("tokenclean_ray ")


def test_the_task_is_a_shift_by_three():
    assert demo._shift(["b", "z"]) == ["f", "d"]


def test_an_answer_s_words_are_found_in_the_masked_row():
    tokenizer = demo._tokenizer([*demo.SPECIALS, *demo.LETTERS])
    ids = tokenizer("<|user|> b <|assistant|> c d f </s>")["input_ids"]
    labels = [demo.IGNORED] * 3 + [ids[3], demo.IGNORED, ids[5], ids[6]]
    row = {"input_ids": ids, "labels": labels, "planted": json.dumps([False, True, False])}
    words, planted, kept = demo._answer(tokenizer, row)
    assert words == ["c", "d", "f"]
    assert planted.tolist() == [False, True, False]
    np.testing.assert_array_equal(kept, [True, False, True])
