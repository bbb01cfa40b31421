"""What a run prints when it ends: names from data and paths as they are, not as a terminal's or a library's markup."""

import sys

from tokenclean_ray.summary import show_clean, show_sweep

SOURCES = ["[/INST] set", "[bold]x", ":rocket:", "\x1b[31mred"]
SHOWN = ["[/INST] set", "[bold]x", ":rocket:", "⟨U+001B⟩[31mred"]


def test_clean(capsys):
    counts = {"rows": 4, "masked": 4, "nothing_kept": 0, "rejected": 0, "warmup": 0, "tokens": 9, "response_tokens": 8}
    sources = {source: {"tokens": 2, "kept": 1} for source in SOURCES}
    record = {
        "counts": counts | {"rejected_reasons": {}},
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
