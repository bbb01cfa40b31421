"""What a run prints when it ends: names from data and paths as they are, not as a terminal's or a library's markup."""

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
