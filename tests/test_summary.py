"""What a run prints when it ends: names from data and paths as they are, not as markup; each figure in its place."""

import sys

from tokenclean_ray.summary import show_clean, show_evolve, show_sweep, show_train

COUNTS = {"rows": 4, "masked": 4, "nothing_kept": 0, "rejected": 0, "warmup": 0, "tokens": 9, "response_tokens": 8}
SOURCES = ["[/INST] set", "[bold]x", ":rocket:", "\x1b[31mred"]
SHOWN = ["[/INST] set", "[bold]x", ":rocket:", "⟨U+001B⟩[31mred"]


def test_clean(capsys):
    sources = {source: {"tokens": 2, "kept": 1} for source in SOURCES}
    record = {
        "counts": COUNTS | {"rejected_reasons": {}},
        "threshold": {"sources": sources, "tokens": 8, "kept": 4},
        "timings": {},
        "result": {"path": "/runs/[v2]/:x:/masked/v0001"},
    }
    show_clean(record)
    shown = capsys.readouterr().out
    assert all(source in shown for source in SHOWN)
    assert "masked dataset: /runs/[v2]/:x:/masked/v0001\n" in shown
    assert "\x1b" not in shown


def test_sweep(capsys):
    row = {"ratio": 0.5, "score": 0.1, "kept": 4, "near": 0, "bound": 0.1}
    rows = [row | {"sources": dict.fromkeys(SOURCES, (2, 1))}]
    for scope in ("global", "sample"):
        show_sweep({"sweep": rows, "calibration": None, "config": {"select": {"scope": scope}}})
        shown = capsys.readouterr().out
        assert all(source in shown for source in SHOWN)
        assert "\x1b" not in shown
        assert ("by scope: sample, which clean goes by" in shown) == (scope == "sample")


def test_no_figure_of_a_sweep_is_cut_off_by_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in (("COLUMNS", "80"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    names = [f"data/of-the-{n}th-day-of-a-long-month/train.jsonl" for n in range(8)]
    share = {"value": 0.9, "low": 0.85, "high": 0.95}
    numbers = range(1, 10)
    rows = [{"ratio": n / 10, "score": -0.123456 * n, "kept": 123_456_789 * n, "near": 987_654} for n in numbers]
    rows = [row | {"bound": 0.0123, "sources": dict.fromkeys(names, (1000, 100 * n))} for n, row in enumerate(rows, 1)]
    dropped = {"planted_dropped": share, "genuine_dropped": share, "noise_kept": 0.0234}
    calibration = dict.fromkeys(("auroc", "auroc_random", "auroc_other_rows"), share)
    calibration |= {"planted": 1234, "rows": 50, "noise_share": 0.2, "gate_on": "loss"}
    calibration |= {"ratios": [{"ratio": n / 10, **dropped} for n in numbers], "gates": [{"gate": 2.0, **dropped}]}
    show_sweep({"sweep": rows, "calibration": calibration, "config": {"select": {"scope": "global"}}})
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for row in rows:
        assert f"{row['score']:.4g}" in shown
        assert f"{row['kept']:,}" in shown
    assert shown.count("90.0% [85.0%, 95.0%]") == 2 * 9 + 2
    assert shown.count("2.3%") == 9
    of_sources = [line.split() for line in shown.splitlines() if line.endswith(" 90% ")]
    assert [line[-9:] for line in of_sources] == [[f"{n}0%" for n in numbers]] * 8


def test_evolve(capsys):
    full = {"plan": "full", "round": 1, "kept_share": 1.0, "threshold": None, "accepted": True}
    evolving = {"plan": "self_evolving", "round": 2, "kept_share": 0.6, "threshold": 0.125, "accepted": False}
    evolving |= {"held_out": {"loss": 1.25, "standard_error": 0.5}, "agreement": 0.75}
    plan = {"plan": "self_evolving", "rounds": 4, "accepted": 3, "held_out_loss": 1.5, "standard_error": 0.25}
    plan |= {"kept_share": 0.7, "tokens_trained": 1234, "seconds": 9.5}
    record = {
        "rounds": [full, evolving],
        "comparison": [plan],
        "result_model": "/runs/[v2]/m",
        "timings": {"score_s": 2},
    }
    record |= {"counts": COUNTS | {"warmup": 3, "rejected_reasons": {"too long": 2}}, "result": {"path": "/runs/x"}}
    show_evolve(record)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        *("rows 4 = masked 4 + nothing kept 0 + rejected 0 + not selected from 3", "rejected: too long: 2"),
        *("full 1 100.0% yes", "self_evolving 2 1.2500 ± 0.5000 60.0% 0.125 75.0% no"),
        *("self_evolving 3/4 1.5000 ± 0.2500 70.0% 1,234 9.5", "model: /runs/[v2]/m", "seconds score 2.0"),
    ):
        assert line in lines


def test_train(capsys):
    show_train({"steps": 1000, "tokens": 12345, "seconds": 2.5, "loss": [3.0, 2.0, 1.5], "path": "/runs/[v2]/m"})
    first, last = capsys.readouterr().out.splitlines()
    assert first == "1,000 steps over 12,345 kept tokens in 2.5 s, loss 3.0000 at the first, 1.5000 at the last"
    assert last == "model: /runs/[v2]/m"
