"""What a report shows of a finished run, as one small JSON-able structure.

Counts are exact: they come from run.json and threshold.json. Distributions, token tables and example rows come from
a seeded sample of parts, whose size the structure states; so neither time nor size grow with the dataset.
"""

import itertools
import random
from typing import Any

import numpy as np

from tokenclean_ray.finished import SEED, Chosen, Finished, ScoredPart, row_tokens, sample_parts, visible, whole
from tokenclean_ray.layout import TRAINED
from tokenclean_ray.selection import NEAR

SCORE_BINS, LOSS_BINS = 60, 32
PLACES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]  # in the answer, where a bin begins
MAX_TURNS, MAX_SOURCES, MAX_REASONS, MAX_CURVE = 12, 40, 30, 200
MAX_CUTS = 13  # one more than the page lists, so that it says that there are more
NUM_TOKENS, SEEN_AT_LEAST = 25, 20  # of the token tables; rarer tokens say little
NUM_EXAMPLES, EXAMPLE_TOKENS, PROMPT_CHARS, NAME_CHARS = 60, 400, 2000, 200

Data = dict[str, Any]


def gather(finished: Finished) -> Data:
    """Everything that the report shows."""
    record = finished.record
    sample = list(sample_parts(finished))
    score = np.concatenate([part.tokens.score for part in sample])
    keep = np.concatenate([part.keep for part in sample])
    examples = _examples(finished, sample)
    return {
        "run": visible(finished.store.url),
        "result": visible(record["result"]["path"]),
        "tokenclean": record["tokenclean"],
        "models": {name: visible(model["adapter"] or model["path"]) for name, model in record["models"].items()},
        "select": finished.select,
        "counts": _counts(finished),
        "cuts": _cuts(finished.selections, examples),
        "near": NEAR,
        "sources": _sources(finished),
        "sample": _sample_size(finished, sample),
        "scores": _scores(score, keep),
        "losses": _losses(sample, keep),
        "places": _places(np.concatenate([part.place for part in sample]), keep),
        "turns": _turns(np.concatenate([part.turn for part in sample]), keep),
        "tokens": _tokens(finished, np.concatenate([part.ids for part in sample]), score, keep),
        "rounds": record.get("rounds", []),
        "curves": _curves(finished),
        "comparison": record.get("comparison", []),
        "calibration": _calibration(finished),
        "examples": examples,
    }


# -- exact -------------------------------------------------------------------------------------------------------


def _counts(finished: Finished) -> Data:
    counts = {key: value for key, value in finished.record["counts"].items() if key != "rejected_reasons"}
    reasons = finished.record["counts"]["rejected_reasons"]
    total = {key: sum(c.threshold[key] for c in finished.selections) for key in ("kept", "near", "ties")}
    selected = sum(c.threshold["tokens"] for c in finished.selections)
    commonest = [{"reason": _name(reason), "rows": rows} for reason, rows in reasons.items()][:MAX_REASONS]
    return counts | total | {"selected": selected, "dropped": selected - total["kept"], "reasons": commonest}


def _cuts(selections: list[Chosen], examples: list[Data]) -> list[Data]:
    """The first ones, those for all sources of a round, and those that the example rows' colours go by."""
    shown = {(example["round"], example["source"]) for example in examples}
    cuts = [
        {"round": chosen.round, "source": _name(source), "score": score}
        for chosen in selections
        for source, score in chosen.scores.items()
    ]
    return [
        cut for n, cut in enumerate(cuts) if n < MAX_CUTS or not cut["source"] or (cut["round"], cut["source"]) in shown
    ]


def _sources(finished: Finished) -> list[Data]:
    """The largest sources, and the others as one."""
    ranked = sorted(finished.sources.items(), key=lambda item: -item[1][0])
    rows = [{"name": _name(name), "tokens": n, "kept": k} for name, (n, k) in ranked[:MAX_SOURCES]]
    if rest := ranked[MAX_SOURCES:]:
        tokens, kept = (sum(counts[i] for _, counts in rest) for i in (0, 1))
        rows.append({"name": f"{len(rest):,} other sources", "tokens": tokens, "kept": kept})
    return rows


def _name(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= NAME_CHARS else shown[:NAME_CHARS] + "…"


def _curves(finished: Finished) -> list[Data]:
    """The rounds' training losses, thinned; of their models, since metrics.jsonl may be of a run that is still on."""
    found = []
    for outcome in finished.record.get("rounds", []):
        name = outcome["model"].rpartition("/")[2]
        with whole(finished.store):
            curve = (finished.store.read_json(f"models/{name}/{TRAINED}") or {"loss": []})["loss"]
        step = -(-len(curve) // MAX_CURVE)
        points = [{"step": n + 1, "loss": _short(curve[n])} for n in range(0, len(curve), max(step, 1))]
        found.append({"round": f"{outcome['plan']} {outcome['round']}", "points": points})
    return found


def _calibration(finished: Finished) -> Any:
    found = [c.threshold["calibration"] for c in finished.selections if "calibration" in c.threshold]
    return found[-1] if found else None


# -- sampled -----------------------------------------------------------------------------------------------------


def _sample_size(finished: Finished, sample: list[ScoredPart]) -> Data:
    return {
        "seed": SEED,
        "parts": len(sample),
        "of_parts": sum(len(c.parts) for c in finished.selections),
        "rows": sum(part.tokens.encoded.num_rows for part in sample),
        "response_tokens": sum(len(part.keep) for part in sample),
    }


def _scores(score: np.ndarray, keep: np.ndarray) -> Data:
    """Histogram of the scores, kept and dropped; the outermost half per cent on either side in the end bins."""
    ruled_out = np.isneginf(score)
    finite = score[~ruled_out]
    if not len(finite):
        return {"bins": [], "ruled_out": int(ruled_out.sum())}
    low, high = np.quantile(finite, [0.005, 0.995])
    edges = np.linspace(low, max(high, low + 1e-6), SCORE_BINS + 1)
    inside = np.clip(finite, edges[0], edges[-1])
    kept, dropped = (np.histogram(inside[mask], edges)[0] for mask in (keep[~ruled_out], ~keep[~ruled_out]))
    bins = [
        {"low": _short(a), "high": _short(b), "kept": int(k), "dropped": int(d)}
        for a, b, k, d in zip(edges[:-1], edges[1:], kept, dropped, strict=True)
    ]
    return {"bins": bins, "ruled_out": int(ruled_out.sum())}


def _losses(sample: list[ScoredPart], keep: np.ndarray) -> list[Data]:
    """Counts over a grid of base and reference loss; empty where the scorer does not read both."""
    if any(len(part.losses) < 2 for part in sample):
        return []
    base, reference = (np.concatenate([part.losses[name] for part in sample]) for name in ("base", "reference"))
    edges = np.linspace(0, np.quantile(np.maximum(base, reference), 0.995) + 1e-6, LOSS_BINS + 1)
    x, y = (np.clip(loss, edges[0], edges[-1]) for loss in (base, reference))
    grid = (edges, edges)
    tokens, kept = np.histogram2d(x, y, grid)[0], np.histogram2d(x[keep], y[keep], grid)[0]
    step = edges[1]
    return [
        {"base": _short(i * step), "reference": _short(j * step), "step": _short(step),
         "tokens": int(tokens[i, j]), "share": _short(kept[i, j] / tokens[i, j])}
        for i, j in zip(*np.nonzero(tokens), strict=True)
    ]  # fmt: skip


def _places(place: np.ndarray, keep: np.ndarray) -> list[Data]:
    group = np.searchsorted(PLACES, place, side="right") - 1
    names = [f"{a + 1}" if b == a + 1 else f"{a + 1}–{b}" for a, b in itertools.pairwise(PLACES)]
    names.append(f"{PLACES[-1] + 1}…")
    return _shares(group, keep, names)


def _turns(turn: np.ndarray, keep: np.ndarray) -> list[Data]:
    names = [str(n + 1) for n in range(MAX_TURNS - 1)] + [f"{MAX_TURNS}…"]
    return _shares(np.minimum(turn, MAX_TURNS - 1), keep, names)


def _shares(group: np.ndarray, keep: np.ndarray, names: list[str]) -> list[Data]:
    tokens, kept = np.bincount(group, minlength=len(names)), np.bincount(group[keep], minlength=len(names))
    return [
        {"name": name, "tokens": int(n), "kept": int(k)} for name, n, k in zip(names, tokens, kept, strict=True) if n
    ]


def _tokens(finished: Finished, ids: np.ndarray, score: np.ndarray, keep: np.ndarray) -> Data:
    """Tokens kept and dropped most beyond what their number explains.

    Ranked by (kept − p·seen) / √(seen·p·(1 − p)), p the kept share of all tokens: how many standard deviations more
    often a token was kept than by chance. A plain count would list the commonest tokens twice.
    """
    seen = np.bincount(ids)
    kept = np.bincount(ids[keep], minlength=len(seen))
    sums = np.bincount(ids, np.where(np.isfinite(score), score, 0))
    p = keep.mean()
    known = np.flatnonzero(seen >= min(SEEN_AT_LEAST, seen.max()))
    excess = (kept - p * seen)[known] / np.sqrt(np.maximum(seen[known] * p * (1 - p), 1e-9))
    order = known[np.argsort(excess, kind="stable")]
    excess = np.sort(excess, kind="stable")

    def table(which: np.ndarray) -> list[Data]:
        shown = [_token_text(finished.tokenizer, int(t)) for t in which]
        return [
            {"token": _name(text), "seen": int(seen[t]), "kept": int(kept[t]), "score": _short(sums[t] / seen[t])}
            for text, t in zip(shown, which, strict=True)
        ]

    return {"dropped": table(order[excess < 0][:NUM_TOKENS]), "kept": table(order[excess > 0][::-1][:NUM_TOKENS])}


def _token_text(tokenizer: Any, token: int) -> str:
    """A token as text, or as the vocabulary spells it where it is no text by itself."""
    text = tokenizer.decode([token])
    return text if text.strip() and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)


# -- example rows ------------------------------------------------------------------------------------------------


def _examples(finished: Finished, sample: list[ScoredPart]) -> list[Data]:
    """Rows of every source in turn, in a seeded order, and the rows of the sample that lost the largest share."""
    places: dict[str, list[tuple[int, int]]] = {}
    changed = []
    for number, part in enumerate(sample):
        for row, source in enumerate(part.sources):
            places.setdefault(source, []).append((number, row))
        worst = np.argsort(-part.dropped, kind="stable")[: NUM_EXAMPLES // 4]
        changed += [(float(part.dropped[row]), number, int(row)) for row in worst]
    rng = random.Random(SEED)
    for rows in places.values():
        rng.shuffle(rows)
    in_turn = (place for group in itertools.zip_longest(*places.values()) for place in group if place)
    chosen = [(number, row) for _, number, row in sorted(changed, reverse=True)[: NUM_EXAMPLES // 4]]
    chosen = list(dict.fromkeys(itertools.chain(itertools.islice(in_turn, NUM_EXAMPLES - len(chosen)), chosen)))
    return [_example(finished, sample[number], row) for number, row in chosen]


def _example(finished: Finished, part: ScoredPart, row: int) -> Data:
    pieces: list[Any] = []
    for piece in row_tokens(finished, part, row):
        if isinstance(piece, str):
            pieces.append(piece if len(piece) <= PROMPT_CHARS else f"{piece[:PROMPT_CHARS]} …")
        else:
            figures = [_short(piece.get(name)) for name in ("score", "base", "reference")]
            pieces.append([piece["text"], int(piece["keep"]), *figures])
    of_row = part.tokens.row == row
    return {
        "part": part.tokens.part,
        "row": int(part.tokens.row_numbers[row]),
        "round": part.round,
        "source": _name(part.sources[row]),
        "tokens": int(of_row.sum()),
        "kept": int((part.keep & of_row).sum()),
        "cut_short": len(pieces) > EXAMPLE_TOKENS,
        "pieces": pieces[:EXAMPLE_TOKENS],
    }


def _short(value: Any) -> float | None:
    """Four digits say all that a chart shows."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")
