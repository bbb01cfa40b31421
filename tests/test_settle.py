"""gate: auto, keep_ratio: auto, planted calibration and the sweep on a real Ray, against counting the files."""

import contextlib

import numpy as np
import pytest
from conftest import chat, write_rows
from test_rounds import config_for, kept_set, masked_rows, read, some_rows

from tokenclean_ray import pipeline, rounds, selection, settle, summary, workers
from tokenclean_ray.config import Calibrate, Select
from tokenclean_ray.errors import UserError
from tokenclean_ray.export_card import card
from tokenclean_ray.finished import open_finished, read_scored
from tokenclean_ray.layout import Store
from tokenclean_ray.plant import KINDS
from tokenclean_ray.report_data import gather
from tokenclean_ray.tokens import part_tokens

pytestmark = pytest.mark.usefixtures("ray_session")

CALIBRATE = Calibrate(share=0.3, replaced=0.3)


def with_select(config, **select):
    return config.model_copy(update={"select": Select(**{"scorer": "excess_loss", **select})})


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory, model_pair):
    """One run with the paper's score, and its config."""
    folder = tmp_path_factory.mktemp("settle")
    with contextlib.chdir(folder):  # what is planted where follows from the path as it is written
        config = config_for(folder, model_pair, some_rows(150), data={"path": "data.jsonl"})
        yield config, rounds.clean(config)


def files(config, folder):
    store = Store(config.output)
    names = sorted(store.part_names(folder))
    return dict(zip(names, store.checksums(folder, [f"{name}.parquet" for name in names]), strict=True))


def assert_reads_as_published(record):
    """What report, inspect and export see of a run is what it kept."""
    finished = open_finished(record["config"]["output"])
    (chosen,) = finished.selections
    assert sum(read_scored(finished, chosen, part).keep.sum() for part in chosen.parts) == chosen.threshold["kept"]


def test_the_sweep_says_what_clean_keeps_and_scores_nothing_again(cleaned, capsys):
    config, record = cleaned
    folders = record["threshold"]["losses"].values()
    before = [files(config, folder) for folder in folders]
    swept = rounds.sweep(config)
    assert [files(config, folder) for folder in folders] == before
    assert [row["ratio"] for row in swept["sweep"]] == settle.RATIOS
    at = {row["ratio"]: row for row in swept["sweep"]}
    threshold = record["threshold"]
    row = at[0.6]
    assert (row["score"], row["kept"], row["near"]) == tuple(threshold[key] for key in ("score", "kept", "near"))
    assert row["sources"] == {s: [n["tokens"], n["kept"]] for s, n in threshold["sources"].items()}
    for scope in ("source", "sample"):
        assert rounds.sweep(with_select(config, scope=scope))["sweep"] == swept["sweep"]
    other = rounds.clean(with_select(config, keep_ratio=0.3))["threshold"]
    assert (at[0.3]["score"], at[0.3]["kept"]) == (other["score"], other["kept"])
    summary.show_sweep(swept)
    out = capsys.readouterr().out
    assert f"{threshold['score']:.4g}" in out
    assert f"{row['kept']:,}" in out


@pytest.mark.parametrize("scope", ["global", "source"])
@pytest.mark.parametrize("few", [0, 20, 2000])
def test_cuts_are_the_same_however_many_passes_they_take(cleaned, monkeypatch, few, scope):
    """Over workers too: digit by digit, where a sample misleads, and where all tokens near the cuts are gathered."""
    config, record = cleaned
    store, losses = Store(config.output), record["threshold"]["losses"]
    parts = sorted(store.part_names("encoded"))
    assert len(parts) > workers.FEW_PARTS
    select = Select(scorer="excess_loss", scope=scope)
    found = pipeline.find_cuts(store, parts, losses, select, settle.RATIOS)
    monkeypatch.setattr(selection, "FEW", few)
    again = pipeline.find_cuts(store, parts, losses, select, settle.RATIOS)
    assert again.keys() == found.keys()
    assert sum(one.tokens for (_, ratio), one in again.items() if ratio == 0.6) == record["threshold"]["tokens"]
    tokens = [part_tokens(store, part, losses, select) for part in parts]
    for ratio in settle.RATIOS:  # between two neighbours many places are the same cut
        kept, wanted = (
            np.concatenate(
                [of.keep(select, {name: one.cut for (name, at), one in cuts.items() if at == ratio}) for of in tokens]
            )
            for cuts in (again, found)
        )
        np.testing.assert_array_equal(kept, wanted)
        assert kept.sum() == sum(one.k for (_, at), one in again.items() if at == ratio)
    if scope == "global":
        assert found["", 0.6].cut == selection.Cut(**record["threshold"]["cut"])


def test_calibration_counts_what_each_ratio_and_gate_drops_and_publishes_no_copy(cleaned, capsys):
    config, plain = cleaned
    record = rounds.clean(with_select(config, calibrate=CALIBRATE))
    assert masked_rows(record) == masked_rows(plain)
    assert record["counts"] == plain["counts"]
    found = record["threshold"]["calibration"]
    losses = {
        role: {(r["part"], r["row"]): r["loss"] for r in read(record, folder)}
        for role, folder in record["threshold"]["losses"].items()
    }
    copies = [r for r in read(record, "encoded") if "planted" in r]
    scores, gate_losses = {"genuine": [], **{kind: [] for kind in KINDS}}, {"genuine": [], "planted": []}
    for copy in copies:
        original = (copy["part"].partition("-planted")[0], copy["row"])
        for t, kind in enumerate(copy["planted"]):
            for name, key, wanted in (
                ("genuine", original, copy["response_mask"][t]),
                (KINDS[kind - 1], (copy["part"], copy["row"]), kind),
            ):
                if wanted:
                    base, reference = (np.float32(losses[role][key][t]) for role in ("base", "reference"))
                    scores[name].append(base - reference)
                    gate_losses["genuine" if name == "genuine" else "planted"].append(reference)
    planted = np.concatenate([scores[kind] for kind in KINDS])
    assert found["rows"] == len(copies)
    assert (found["planted"], found["genuine"]) == (len(planted), len(scores["genuine"]))
    genuine = np.array(scores["genuine"])
    pairs = (genuine[:, None] > planted).mean() + (genuine[:, None] == planted).mean() / 2
    assert found["auroc"]["value"] == pytest.approx(pairs, abs=5e-3)
    cut = record["threshold"]["score"]
    at = next(row for row in found["ratios"] if row["ratio"] == 0.6)
    assert at["planted_dropped"]["value"] == pytest.approx((planted < cut).mean(), abs=5e-3)
    assert at["genuine_dropped"]["value"] == pytest.approx((genuine < cut).mean(), abs=5e-3)
    for row in found["gates"]:
        for name, values in gate_losses.items():
            assert row[f"{name}_dropped"]["value"] == pytest.approx((np.array(values) >= row["gate"]).mean())
    assert "calibration" not in rounds.clean(config)["threshold"]  # the same selection, of which none was asked for
    summary.show_clean(record)
    assert f"{len(planted):,} tokens in copies of {len(copies)} rows" in capsys.readouterr().out


def test_keep_ratio_auto_takes_what_the_calibration_says(cleaned):
    config, _ = cleaned
    select = {"scorer": "plausibility", "calibrate": CALIBRATE}
    calibration = rounds.sweep(with_select(config, **select))["calibration"]
    estimates = {row["ratio"]: row["noise_kept"] for row in calibration["ratios"]}
    limit = estimates[0.2] + 1e-6
    select["keep_ratio"] = "auto"
    record = rounds.clean(with_select(config, **select, max_noise=limit))
    threshold = record["threshold"]
    assert record["config"]["select"]["keep_ratio"] == "auto"
    ratio = threshold["select"]["keep_ratio"]
    assert threshold["k"] == int(ratio * threshold["tokens"])
    assert ratio >= 0.2
    assert all(value > limit for other, value in estimates.items() if other > ratio)
    assert threshold["calibration"] == calibration | {"largest_ratio": ratio}
    assert_reads_as_published(record)
    same = rounds.clean(with_select(config, scorer="plausibility", keep_ratio=ratio))
    assert same["result"] == record["result"]  # the same tokens, so the same selection and snapshot
    with pytest.raises(UserError, match=r"no keep_ratio keeps .* raise it, or take another scorer"):
        rounds.clean(with_select(config, **select, max_noise=1e-9))
    nothing_fits = rounds.sweep(with_select(config, **select, max_noise=1e-9))
    assert nothing_fits["calibration"] == calibration | {"largest_ratio": None}
    few = Calibrate(share=0.001)
    with pytest.raises(UserError, match=r"raise select\.calibrate\.share"):
        rounds.clean(with_select(config, keep_ratio="auto", calibrate=few))


def test_gate_auto_is_the_quantile_of_the_clean_rows(cleaned, tmp_path):
    config, _ = cleaned
    clean_rows = write_rows(tmp_path / "clean.jsonl", some_rows(40, seed=9))
    data = config.data.model_copy(update={"held_out": (clean_rows,)})
    gated = Select(scorer="gated_excess_loss", gate="auto", gate_quantile=0.8)
    record = rounds.clean(config.model_copy(update={"data": data, "select": gated}))
    pool = {(r["part"], r["row"]) for r in masked_rows(record).values()}
    folder = record["threshold"]["losses"]["reference"]
    encoded = {(r["part"], r["row"]): r for r in read(record, "encoded") if "planted" not in r}
    held = [(r, encoded[r["part"], r["row"]]) for r in read(record, folder) if (r["part"], r["row"]) in encoded]
    names = {p for p, _ in pool} | {p for p, _ in masked_rows(rounds.clean(config))}
    values = np.concatenate(
        [np.array(r["loss"], np.float32)[e["response_mask"]] for r, e in held if r["part"] not in names]
    )
    expected = np.sort(values)[int(0.8 * len(values)) - 1]
    gate = record["threshold"]["select"]["gate"]
    assert gate == pytest.approx(expected, rel=1e-6)
    assert (values < np.float32(gate)).sum() == int(0.8 * len(values))
    assert_reads_as_published(record)
    surprise = gated.model_copy(update={"gate_on": "surprise", "gate_quantile": 0.05})
    below = rounds.clean(config.model_copy(update={"data": data, "select": surprise}))
    assert below["threshold"]["select"]["gate"] < 0
    assert_reads_as_published(below)
    # of the base only the losses are read, whatever the gate is on: they are there
    losses = below["threshold"]["losses"]
    assert losses["base"] == record["threshold"]["losses"]["base"]
    assert losses["reference"] == f"{folder}-entropy"


@pytest.mark.parametrize(
    ("key", "message"),
    [("warmup", "none are held out: give more rows as data.warmup"), ("held_out", r"\d+ clean tokens are too few for")],
)
def test_gate_auto_of_too_few_clean_tokens(cleaned, tmp_path, key, message):
    config, _ = cleaned
    few = write_rows(tmp_path / "few.jsonl", [chat("q", "Yes.")])  # as a warm-up, it leaves nothing to be held out
    data = config.data.model_copy(update={key: (few,)})
    gated = Select(scorer="gated_excess_loss", gate="auto", gate_quantile=0.01)
    with pytest.raises(UserError, match=message):
        rounds.clean(config.model_copy(update={"data": data, "select": gated}))


def test_each_source_keeps_its_own_share(cleaned):
    config, record = cleaned
    chosen = rounds.clean(with_select(config, scope="source", keep_ratio=0.37))["threshold"]
    assert set(chosen["cuts"]) == set(chosen["sources"]) == {"s0", "s1", "s2"}
    for source, counts in chosen["sources"].items():
        assert counts["kept"] == int(0.37 * counts["tokens"]) == chosen["cuts"][source]["k"]
    tokens = record["threshold"]["tokens"]
    assert chosen["k"] == chosen["kept"] <= int(0.37 * tokens)
    cuts = gather(open_finished(config.output))["cuts"]
    assert {cut["source"]: cut["score"] for cut in cuts} == {s: found["score"] for s, found in chosen["cuts"].items()}
    assert "each source has its own" in card(open_finished(config.output), "unknown")


def test_a_scorer_that_reads_the_base_alone_wants_no_reference(tmp_path, model_pair):
    config = config_for(tmp_path, (model_pair[0], None), some_rows(20), select={"scorer": "base_loss"})
    record = rounds.clean(config)
    assert list(record["threshold"]["losses"]) == ["base"]
    assert len(Store(str(tmp_path / "run")).names("losses")) == 1
    assert len(kept_set(record)) == record["threshold"]["k"]
    everything = rounds.clean(with_select(config, scorer="full", keep_ratio=1))
    assert everything["counts"]["nothing_kept"] == 0
