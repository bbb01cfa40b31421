"""What `tokenclean study` found, for people: study.md and study.png, from its trials.

Input: the trials' records. Output: a table and a panel a setting, mean and standard deviation over seeds.
"""

from pathlib import Path
from typing import Any

import numpy as np
import vl_convert

Trial = dict[str, Any]
COLUMNS = {
    "loss": "loss on clean answers, nats",
    "recovered": "of the gap full to oracle",
    "facts_loss": "loss on facts, nats",
    "accuracy": "right tokens",
    "exact_match": "exact match",
    "kept": "kept",
    "noise_kept": "noise among kept",
    "facts_kept": "facts kept",
    "auroc": "AUROC",
    "gate": "gate",
    "ratio": "keep ratio",
    "noise_share": "noise in the pool, estimated",
    "true_noise_share": "noise in the pool",
    "accepted": "rounds accepted",
}
PLAIN = {"loss": 3, "facts_loss": 3, "auroc": 3, "gate": 2, "accepted": 1}  # digits; the others are shares
PANELS = 3  # in a row


def write(folder: Path, trials: list[Trial], plain: dict[str, Any]) -> str:
    """Write study.md and study.png; returns the former's text.

    Args:
        plain: the setting that the others are described against.
    """
    by_name: dict[str, list[Trial]] = {}
    for trial in trials:
        by_name.setdefault(trial["name"], []).append(trial)
    text = "\n".join(_table(name, _changed(of[0]["setting"], plain), of) for name, of in by_name.items())
    (folder / "study.md").write_text(text, encoding="utf-8")
    _draw(folder / "study.png", by_name)
    return text


def _changed(setting: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in setting.items() if v != plain.get(k) and k not in ("plans", "text")}


def values(trials: list[Trial], plan: str, key: str) -> list[float]:
    """A figure of a plan over seeds; `recovered` is how much of the loss from full to oracle it wins back."""
    if key == "recovered":
        if plan in ("base", "full", "oracle"):
            return []
        found = [[t["plans"][name]["loss"] for name in ("full", plan, "oracle")] for t in trials]
        return [(full - loss) / (full - oracle) for full, loss, oracle in found if full != oracle]
    return [t["plans"][plan][key] for t in trials if key in t["plans"][plan]]


def _table(name: str, changed: dict[str, Any], trials: list[Trial]) -> str:
    plans = list(trials[0]["plans"])
    columns = [key for key in COLUMNS if any(values(trials, plan, key) for plan in plans)]
    shown = ", ".join(f"{key} {value}" for key, value in changed.items())
    lines = [
        f"### {name}" + (f": {shown}" if shown else ""),
        f"\n{_of_how_many(trials)}; {np.mean([t['seconds'] for t in trials]):.0f} s a trial.\n",
        "| plan | " + " | ".join(COLUMNS[key] for key in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for plan in plans:
        cells = (_cell(values(trials, plan, key), PLAIN.get(key)) for key in columns)
        lines.append(f"| {plan} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _of_how_many(trials: list[Trial]) -> str:
    return "One seed" if len(trials) == 1 else f"{len(trials)} seeds, mean ± standard deviation"


def _cell(found: list[float], digits: int | None) -> str:
    if not found:
        return ""
    scale, digits, unit = (1, digits, "") if digits else (100, 1, " %")
    spread = f" ± {scale * np.std(found, ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{scale * np.mean(found):.{digits}f}{spread}{unit}"


def _draw(file: Path, by_name: dict[str, list[Trial]]) -> None:
    """A panel a setting: each plan's loss on clean answers, and on facts where there are some; mean and range."""
    points = [
        {
            "setting": name,
            "plan": plan,
            "of": label,
            "mean": float(np.mean(found)),
            "low": min(found),
            "high": max(found),
        }
        for name, trials in by_name.items()
        for plan in trials[0]["plans"]
        for key, label in (("loss", "clean answers"), ("facts_loss", "facts that only the pool teaches"))
        if (found := values(trials, plan, key))
    ]
    order = list(dict.fromkeys(point["plan"] for point in points))
    losses = {"type": "quantitative", "scale": {"type": "log"}, "title": "held-out loss, nats (mean, range over seeds)"}
    shared = {
        "y": {"field": "plan", "type": "nominal", "sort": order, "title": None, "axis": {"grid": True}},
        "color": {"field": "of", "type": "nominal", "title": "loss on", "legend": {"orient": "top", "labelLimit": 300}},
    }
    layers = [
        {"mark": "rule", "encoding": shared | {"x": {"field": "low", **losses}, "x2": {"field": "high"}}},
        {"mark": {"type": "point", "filled": True}, "encoding": shared | {"x": {"field": "mean", **losses}}},
    ]
    chart = {
        "data": {"values": points},
        "facet": {"field": "setting", "type": "nominal", "sort": list(by_name), "title": None},
        "columns": PANELS,
        "spec": {"width": 260, "height": {"step": 13}, "layer": layers},
        "resolve": {"scale": {"y": "independent"}},
    }
    file.write_bytes(vl_convert.vegalite_to_png(chart))
