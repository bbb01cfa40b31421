"""The benchmarks run, count right, and what is timed is right: no figure here depends on the machine's speed."""

import dataclasses
import itertools
import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from test_rounds import some_rows

from tokenclean_ray import cli
from tokenclean_ray.benchmark import clean, machine, precision, scale, score, select, train, workload

MACHINE = {"matmul_flops": 1e12, "cores": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A machine that is measured in no time, and a small model."""
    for module in (score, train, clean, precision):
        monkeypatch.setattr(module, "machine", lambda device: dict(MACHINE))
    for module in (workload, clean):
        monkeypatch.setattr(module, "SIZE", SMALL)
        monkeypatch.setattr(module, "VOCABULARY", 600)
    monkeypatch.setattr(clean, "TIMED_ROWS", 20)
    monkeypatch.setattr(select, "SORTED", 10_000)


def run(tmp_path, *arguments):
    file = tmp_path / "benchmarks.jsonl"
    assert cli.main(["benchmark", *arguments, "--record", str(file)]) == 0
    return json.loads(file.read_text().splitlines()[-1])


def as_on_a_gpu(monkeypatch):
    """What is written first is timed without cuDNN too."""
    assert machine.baselines("cpu") == {"baseline": True}
    there = machine.baselines("cuda")
    monkeypatch.setattr(machine, "baselines", lambda _: there)


def check_ratios(found, *baselines):
    ours = found["ours"]["tokens_per_s"]
    assert {name for name in found if name.startswith("baseline")} == set(baselines)
    for name in baselines:
        assert found[f"times_{name}"] == pytest.approx(ours / found[name]["tokens_per_s"])


@pytest.mark.parametrize("cudnn", [True, False])
def test_attention_by_cudnn_is_as_wanted(tmp_path, cudnn):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    work = workload.prepare(tmp_path, workload.made_rows(5), 1)
    try:
        score.as_written_first(work, "cpu", cudnn)
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_first_rows_of_a_workload(tmp_path):
    work = workload.prepare(tmp_path, workload.made_rows(5), 1)
    first = work.first(2)
    assert (first.offsets == work.offsets[:3]).all()
    assert (first.ids == work.ids[: work.offsets[2]]).all()
    assert (first.mask == work.mask[: work.offsets[2]]).all()
    assert 0 < first.flops < work.flops
    assert (work.first(9).ids == work.ids).all()


@pytest.mark.parametrize("data", [True, False])
def test_scoring_and_what_people_write_first_agree(tmp_path, capsys, monkeypatch, data):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(40))
    timed = 10 if data else 30  # rows of what people write first
    monkeypatch.setattr(score, "TIMED_ROWS", timed)
    if data:
        as_on_a_gpu(monkeypatch)
    found = run(tmp_path, "score", "--rows", "30", "--baseline", *(["--data", file] if data else []))
    assert found["rows"] == 30
    assert 0 < found["response_tokens"] < found["tokens"]
    assert found["largest_difference"] < 1e-4
    work = workload.prepare(tmp_path / "work", workload.read_rows(file if data else None, 30), 1)
    for of, tokens in (("ours", found["tokens"]), ("baseline", len(work.first(timed).ids))):
        assert found[of]["tokens_per_s"] * found[of]["seconds"] == pytest.approx(tokens)
        assert found[of]["share_of_peak"] == pytest.approx(found[of]["useful_flops"] / 1e12)
    check_ratios(found, "baseline", *(["baseline_without_cudnn"] if data else []))
    assert 0 < found["ours"]["padding"] < found["baseline"]["padding"]
    parts = found["ours"]["share_of_time"]
    assert {"encode", "read", "forward", "head", "write"} < set(parts)
    assert sum(parts.values()) == pytest.approx(1)
    assert found["ours"]["bytes_written"] > 2 * found["response_tokens"]
    out = capsys.readouterr().out
    assert f"{found['tokens']:,}" in out
    assert "times baseline" in out


def test_selection_keeps_its_share_of_the_response_tokens(tmp_path):
    found = run(tmp_path, "select", "--tokens", "300000")
    rows = -(-300000 // 256)
    assert found["kept"] == int(0.6 * (300000 - rows))  # a row's first token is none
    assert 2 <= found["passes"] <= 6
    assert found["times_sort"] == pytest.approx(found["tokens_per_s"] / found["sort_tokens_per_s"])
    again = run(tmp_path, "select", "--tokens", "300000")
    assert again["kept"] == found["kept"]
    assert len((tmp_path / "benchmarks.jsonl").read_text().splitlines()) == 2


def test_half_precision_moves_losses_a_little_and_few_tokens(tmp_path, model_pair, capsys):
    random = run(tmp_path, "precision", "--rows", "4", "--long")  # few: CPUs without float16 take minutes for more
    assert random["tokens"] > 4 * 1000
    assert cli.main(["benchmark", "precision", "--models", model_pair[0]]) == 2
    assert "name two folders, base and reference" in capsys.readouterr().err
    given = run(tmp_path, "precision", "--rows", "8", "--models", *model_pair)
    assert given["models"] == " and ".join(Path(path).name for path in model_pair)
    for found in (random, given):
        for dtype, most in (("bfloat16", 0.2), ("float16", 0.02)):
            of = found[dtype]
            assert 0 < of["mean_difference"] < most
            assert of["mean_difference"] < of["largest_difference"]
            assert of["share_kept_otherwise"] < most
            assert of["times_float32"] == pytest.approx(of["tokens_per_s"] / found["float32"]["tokens_per_s"])


def test_training_and_what_people_write_first_take_the_same_steps(tmp_path, capsys, monkeypatch):
    as_on_a_gpu(monkeypatch)
    assert cli.main(["benchmark", "train", "--rows", "48"]) == 2
    assert "--rows: updates are timed from the second on: give more than 48 rows" in capsys.readouterr().err
    found = run(tmp_path, "train", "--rows", "100", "--baseline")
    assert found["rows"] == 100
    assert found["largest_difference"] < 1e-4  # of the loss of any of three updates
    check_ratios(found, "baseline", "baseline_without_cudnn")
    assert set(found["peak_memory_by_kept_share"]) == {"1", "0.6", "0.3", "0.1"}
    assert 0 < found["ours"]["padding"] < found["baseline"]["padding"]


@pytest.mark.usefixtures("ray_session")
def test_a_whole_run_is_timed_part_by_part(tmp_path):
    found = run(tmp_path, "clean", "--rows", "30", "--baseline")
    ours = found["ours"]
    assert ours["tokens"] == pytest.approx(ours["tokens_per_s"] * ours["seconds"])
    assert found["times_baseline"] == pytest.approx(ours["tokens_per_s"] / found["baseline"]["tokens_per_s"])
    assert {"ray_start", "plan", "encode", "score", "score_wait", "select", "mask"} <= set(ours["share_of_time"])
    assert 0.5 < sum(ours["share_of_time"].values()) <= 1
    assert min(ours["driver_memory"], ours["actor_memory"], ours["written_bytes"]) > 1000


def test_bad_arguments(tmp_path, capsys):
    assert cli.main(["benchmark", "score", "--rows", "0"]) == 2
    assert "--rows must be at least 1" in capsys.readouterr().err
    assert cli.main(["benchmark", "score", "--models", "7B"]) == 2
    assert "7B: no size of a random model; there are 13M, 1B, 3B" in capsys.readouterr().err
    assert cli.main(["benchmark", "score", "--data", write_rows(tmp_path / "a.jsonl", ["no", "row"])]) == 2
    assert "no row can be" in capsys.readouterr().err


def test_a_worker_that_cannot_start_ends_the_benchmark(tmp_path):
    work = workload.prepare(tmp_path, workload.made_rows(10), 2)
    with pytest.raises(BrokenProcessPool):
        score._as_actors(dataclasses.replace(work, model=str(tmp_path / "nowhere")), 2, "cpu")


def test_what_more_rows_cost_is_read_from_medians(tmp_path, monkeypatch, capsys):
    """Not the runs themselves, which take ten minutes: what is made of their figures."""
    late = itertools.cycle([0.0, 9.0, 1.0, 0.5, 5.0])  # the median is 1, of three 1 too

    def run_of(rows, size, vocabulary, actors, part_bytes):
        count = sum(1 for _ in rows)
        figures = {"driver_memory": 5 * 10**8, "actor_memory": 7 * 10**8, "timings": {"actors": 8.0}}
        return figures | {"seconds": 30.0 + count / 1000 + next(late), "ray_start_seconds": 10.0}

    monkeypatch.setattr(scale, "machine", lambda device: dict(MACHINE))
    monkeypatch.setattr(scale, "_run", run_of)
    monkeypatch.setattr(scale, "FEWEST", 100)
    monkeypatch.setattr(scale, "RUNS", {100: 5})
    found = run(tmp_path, "scale", "--rows", "100")
    assert found["runs"]["100"]["seconds"] == pytest.approx(31.1)
    assert len(found["seconds_of_each"]["100"]) == 5
    assert found["gain_of_a_second_actor"] == pytest.approx(2)
    assert "29.1 s" in capsys.readouterr().out  # each run's, without Ray's start
    monkeypatch.setattr(scale, "RUNS", {100: 1})
    late = itertools.repeat(0.0)
    found = run(tmp_path, "scale", "--rows", "10000")
    assert list(found["runs"]) == ["100", "1000", "10000"]
    assert found["microseconds_per_row"] == {"100_to_1000": pytest.approx(1000), "1000_to_10000": pytest.approx(1000)}
    assert found["fixed_seconds"] == pytest.approx(20)
    assert (tmp_path / "scale.png").read_bytes()[:4] == b"\x89PNG"
