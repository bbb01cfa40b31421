"""Planted copies and what is estimated from them, against counting, sorting and mixtures whose truth is known."""

import numpy as np
import pyarrow as pa
import pytest

from tokenclean_ray import calibrate, schema, selection
from tokenclean_ray.calibrate import FOLDS, Scores
from tokenclean_ray.config import Calibrate, Select
from tokenclean_ray.layout import Store
from tokenclean_ray.plant import KINDS
from tokenclean_ray.schema import list_column

PART = "part-0123456789abcdef"
SETTINGS = Calibrate(share=0.3, replaced=0.25, seed=3)
CANDIDATES = np.arange(500, 900)


@pytest.fixture
def store(tmp_path):
    """A part of 200 rows whose token ids tell their row."""
    store = Store(str(tmp_path))
    random = np.random.default_rng(0)
    lengths = random.integers(3, 20, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = random.random(offsets[-1]) < 0.7
    mask[offsets[:-1]] = False
    rows = pa.array(np.arange(200) * 2, pa.int32())  # some rows were rejected
    ids = list_column(np.repeat(np.arange(200), lengths), offsets, schema.TOKENS)
    columns = [rows, pa.array(["s"] * 200), ids, list_column(mask, offsets, pa.list_(pa.bool_()))]
    store.write_part("encoded", PART, pa.table(columns, schema.encoded()), {"rows": 200})
    return store


def test_copies_differ_from_their_originals_where_they_say_so(store):
    summary = calibrate.plant_part(store, PART, SETTINGS, CANDIDATES)
    copies = store.read_part("encoded", summary["part"])
    originals = {r["row"]: r for r in store.read_part("encoded", PART).to_pylist()}
    assert summary["part"] == f"{PART}-planted0.3.0.25.3"
    assert 40 < copies.num_rows < 80
    planted = response = 0
    for copy in copies.to_pylist():
        original = originals[copy["row"]]
        assert copy["response_mask"] == original["response_mask"]
        for new, old, kind, may in zip(
            copy["input_ids"], original["input_ids"], copy["planted"], copy["response_mask"], strict=True
        ):
            assert (kind > 0) == (new != old)
            assert may or not kind
            assert {0: new == old, 1: new >= 500, 2: new < 200}[kind]
            planted, response = planted + (kind > 0), response + may
    assert summary["planted"] == planted == pytest.approx(0.25 * response, rel=0.2)
    assert summary["rows"] == copies.num_rows


def test_the_same_seed_plants_the_same_and_another_seed_other_rows(store):
    first = calibrate.plant_part(store, PART, SETTINGS, CANDIDATES)["part"]
    before = store.read_part("encoded", first)
    assert calibrate.plant_part(store, PART, SETTINGS, CANDIDATES)["part"] == first
    assert store.read_part("encoded", first).equals(before)
    other = calibrate.plant_part(store, PART, SETTINGS.model_copy(update={"seed": 4}), CANDIDATES)["part"]
    assert other != first
    assert not store.read_part("encoded", other)["row"].equals(before["row"])


def test_counts_are_of_the_tokens_that_they_name(store):
    copies = calibrate.plant_part(store, PART, SETTINGS, CANDIDATES)["part"]
    random = np.random.default_rng(1)
    for part in (PART, copies):
        encoded = store.read_part("encoded", part)
        ids, offsets = schema.flat_lists(encoded["input_ids"])
        losses = list_column(random.exponential(2, len(ids)).astype(np.float32), offsets, pa.list_(pa.float32()))
        store.write_part("losses/base", part, pa.table([encoded["row"], losses], schema.losses()), {})
    found = calibrate.count_scores(store, PART, copies, {"base": "losses/base"}, Select(scorer="base_loss"))
    rows = {r["row"]: r for r in store.read_part("losses/base", PART).to_pylist()}
    expected = {"genuine": [], **{kind: [] for kind in KINDS}}
    losses = store.read_part("losses/base", copies).to_pylist()
    for copy, loss in zip(store.read_part("encoded", copies).to_pylist(), losses, strict=True):
        for t, kind in enumerate(copy["planted"]):
            if copy["response_mask"][t]:
                expected["genuine"].append(rows[copy["row"]]["loss"][t])
            if kind:
                expected[KINDS[kind - 1]].append(loss["loss"][t])
    for name, scores in expected.items():
        total = sum(histogram for (kind, _), histogram in found.items() if kind == name)
        digits = selection.order_key(np.array(scores, np.float32)) >> 16
        np.testing.assert_array_equal(total, np.bincount(digits, minlength=1 << 16))
    assert len({fold for kind, fold in found if kind == "genuine"}) > FOLDS / 2
    assert found["pool", 0].sum() == sum(sum(r["response_mask"]) for r in store.read_part("encoded", PART).to_pylist())


def digits(scores):
    return np.bincount(selection.order_key(scores.astype(np.float32)) >> 16, minlength=1 << 16)


def made_up(noise=0.2, planted=8000, pool=200_000, apart=3.0, seed=0):
    """Clean scores around `apart`, noise around 0; and which of the pool is noise."""
    random = np.random.default_rng(seed)
    is_noise = random.random(pool) < noise
    scores = random.normal(size=pool) + np.where(is_noise, 0, apart)
    planted_scores = random.normal(size=(FOLDS, planted // FOLDS))
    genuine = random.choice(scores, (FOLDS, planted // FOLDS))
    found = Scores(digits(scores), *(np.array([digits(fold) for fold in of]) for of in (planted_scores, genuine)))
    return found, scores, is_noise, planted_scores


def test_auroc_counts_pairs():
    _, scores, _, planted = made_up()
    low, high = planted.ravel()[:300], scores[:400]
    pairs = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
    assert calibrate.auroc(digits(low), digits(high)) == pytest.approx(pairs, abs=2e-3)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
def test_kept_shares_are_those_of_a_sort(ratio):
    found, scores, _, planted = made_up()
    threshold = np.sort(scores)[::-1][int(ratio * len(scores)) - 1]
    cut = calibrate.cut_at(found.pool, ratio)
    assert calibrate.kept_share(found.pool, cut) == pytest.approx(ratio)
    assert calibrate.kept_share(found.planted.sum(0), cut) == pytest.approx((planted >= threshold).mean(), abs=5e-3)


def test_what_a_scorer_rules_out_is_never_kept():
    counts = digits(np.array([1.0, 2.0, -np.inf, -np.inf]))
    for ratio, kept in ((1.0, 0.5), (0.25, 0.25)):
        assert calibrate.kept_share(counts, calibrate.cut_at(counts, ratio)) == kept
    never = digits(np.array([-np.inf]))
    assert calibrate.kept_share(never, calibrate.cut_at(never, 1.0)) == 0


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_the_share_of_noise_is_found_where_noise_scores_as_planted_tokens_do(noise):
    found, scores, is_noise, _ = made_up(noise)
    share = calibrate.pool_noise([found])
    assert is_noise.mean() <= share <= noise + 0.02
    order = np.argsort(-scores)
    for row in calibrate.dropped_by_ratio(found, [0.3, 0.6, 0.9], share):
        kept = order[: int(row["ratio"] * len(scores))]
        assert is_noise[kept].mean() <= row["noise_kept"] <= is_noise[kept].mean() + 0.025
        assert row["planted_dropped"]["low"] <= row["planted_dropped"]["value"] <= row["planted_dropped"]["high"]


def test_where_noise_cannot_be_told_apart_the_bound_stays_above_it():
    found, _, _, _ = made_up(0.2, apart=0.5)
    assert calibrate.noise_share(found) > 0.2


def test_of_several_scorers_the_least_limit_counts():
    near, far = (made_up(0.2, apart=apart)[0] for apart in (0.5, 3.0))
    assert calibrate.pool_noise([near, far]) == calibrate.noise_share(far)


@pytest.mark.parametrize(("noise", "apart", "planted"), [(0.2, 3.0, 208), (0.3, 2.0, 208), (0.1, 3.0, 1600)])
def test_limits_hold_what_they_say(noise, apart, planted):
    """Of 80 samples of planted tokens each limit is below the truth in at most a few, the ratio's noise too."""
    found, scores, is_noise, _ = made_up(noise, apart=apart)
    by_truth = np.cumsum(is_noise[np.argsort(-scores)]) / np.arange(1, len(scores) + 1)
    too_low = np.zeros(3)
    for seed in range(80):
        sample = made_up(noise, planted, pool=100, apart=apart, seed=seed + 1)[0]
        one = Scores(found.pool, sample.planted, sample.genuine)
        share = calibrate.pool_noise([one])
        ratio = calibrate.largest_ratio(one, share, 0.05)
        kept, chosen = (by_truth[int(of * len(scores)) - 1] for of in (0.7, ratio or 0.01))
        too_low += [share < is_noise.mean(), calibrate.noise_kept(one, 0.7, share) < kept, chosen > 0.05]
    assert (too_low <= 8).all()


@pytest.mark.parametrize("rows", [100, 400])
def test_the_limit_on_noise_holds_where_tokens_of_a_row_score_alike(rows):
    """Of 80 samples of rows with about 20 planted tokens, which share a third of what they vary by."""
    found, _, is_noise, _ = made_up(0.2, apart=6.0)
    too_low = 0
    for seed in range(80):
        random = np.random.default_rng(seed)
        length = random.geometric(0.05, rows)
        of_row = np.repeat(random.normal(size=rows), length)
        scores = 0.3**0.5 * of_row + 0.7**0.5 * random.normal(size=length.sum())
        fold = np.repeat(np.arange(rows) % FOLDS, length)
        planted = np.array([digits(scores[fold == number]) for number in range(FOLDS)])
        too_low += calibrate.noise_share(Scores(found.pool, planted, planted)) < is_noise.mean()
    assert too_low <= 8


@pytest.mark.parametrize("others", [0, 1])
def test_the_limit_on_noise_where_planted_tokens_all_score_alike(others):
    """As those that a scorer rules out."""
    clean = np.linspace(1.0, 2.0, 8000)
    planted = [np.append(np.full(100 - others, -np.inf), np.zeros(others)) for _ in range(FOLDS)]
    counts = np.array([digits(of) for of in planted])
    found = Scores(digits(np.append(np.full(2000, -np.inf), clean)), counts, counts)
    assert 0.2 < calibrate.noise_share(found) < 0.22


@pytest.mark.parametrize("folds", [0, 1])
def test_planted_tokens_of_too_few_rows_limit_nothing(folds):
    found, _, _, _ = made_up()
    planted = found.planted * (np.arange(FOLDS) < folds)[:, None]
    assert calibrate.noise_share(Scores(found.pool, planted, found.genuine)) == 1


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_intervals_of_few_rows_are_wide_enough(folds):
    """Of 200 samples; with 1.96 errors to either side as few as two thirds."""
    inside = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        planted = np.zeros((FOLDS, 1 << 16), np.int64)
        for fold in range(folds):
            planted[fold] = digits(random.normal(size=200) + 0.4 * random.normal())
        below = np.flatnonzero(digits(np.array([0.0])))[0]
        one = calibrate.estimate(
            Scores(planted.sum(0), planted, planted), lambda p, _, at=below: p[:at].sum() / max(p.sum(), 1)
        )
        inside += one.low <= 0.5 <= one.high
    assert inside >= 182


@pytest.mark.parametrize(("freedom", "tabled"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (15, 2.131)])
def test_student_s_quantiles(freedom, tabled):
    assert calibrate.t95(freedom) == pytest.approx(tabled, rel=0.01)


@pytest.mark.parametrize(("drops", "limits"), [(0, [0, 0.01186]), (0.1, [0.07173, 0.13776]), (1, [0.98814, 1])])
def test_shares_of_none_and_of_all_have_intervals_too(drops, limits):
    """Folds that are all alike tell nothing of how far off a share may be; the limits by hand, of 16 * 20 tokens."""
    at = np.tile(digits(np.repeat([-2.0, 2.0], [int(20 * drops), 20 - int(20 * drops)])), (FOLDS, 1))
    found = Scores(digits(np.linspace(-0.5, 0.5, 1000)), at, at)
    rows = *calibrate.dropped_by_ratio(found, [0.5], 0.3), *calibrate.dropped_by_gate(found, (1.0,))
    for of in (row[name] for row in rows for name in ("planted_dropped", "genuine_dropped")):
        assert of["value"] == pytest.approx(drops)
        assert [of["low"], of["high"]] == pytest.approx(limits, abs=1e-4)


def test_intervals_are_those_of_rows_where_these_are_wider():
    """Planted tokens of which a row's are alike, and three times as many genuine ones that are kept; limits by hand."""
    alike = np.array([digits(np.full(20, -2.0 if fold % 2 else 2.0)) for fold in range(FOLDS)])
    kept = np.tile(digits(np.full(60, 2.0)), (FOLDS, 1))
    found = Scores(digits(np.linspace(-0.5, 0.5, 1000)), alike, kept)
    (by_ratio,) = calibrate.dropped_by_ratio(found, [0.5], 0.3)
    for row in (by_ratio, *calibrate.dropped_by_gate(found, (1.0,))):
        limits = [[row[of]["low"], row[of]["high"]] for of in ("planted_dropped", "genuine_dropped")]
        assert limits[0] == pytest.approx([0.5 - 2.131 / 60**0.5, 0.5 + 2.131 / 60**0.5], abs=2e-3)
        assert limits[1] == pytest.approx([0, 0.00399], abs=1e-5)
    assert by_ratio["noise_kept"] == pytest.approx(0.3 * limits[0][1] / 0.5)
    (none,) = calibrate.dropped_by_ratio(Scores(found.pool, kept[:, ::-1], kept), [0.5], 0.3)
    assert none["noise_kept"] == pytest.approx(0.3 * 0.00281 / 0.5, rel=1e-2)


def test_the_largest_ratio_keeps_noise_within_the_limit():
    found, scores, is_noise, _ = made_up(0.2)
    ratio = calibrate.largest_ratio(found, calibrate.pool_noise([found]), 0.02)
    order = np.argsort(-scores)
    by_truth = np.cumsum(is_noise[order]) / np.arange(1, len(order) + 1)
    largest = np.flatnonzero(by_truth <= 0.02)[-1] / len(order)
    assert largest - 0.04 < ratio <= largest
    assert calibrate.largest_ratio(made_up(0.2, apart=0.5)[0], 0.2, 1e-6) is None


def test_intervals_hold_what_they_say():
    """Of 60 samples about 57 intervals hold the value of all."""
    value = calibrate.auroc(
        *(h.sum(0) for h in (made_up(planted=400_000)[0].planted, made_up(planted=400_000)[0].genuine))
    )
    inside = 0
    for seed in range(60):
        found, *_ = made_up(planted=1600, pool=100, seed=seed + 1)
        random = np.random.default_rng([seed, 9])
        scores = random.normal(size=(FOLDS, 100)) + np.where(random.random((FOLDS, 100)) < 0.2, 0, 3.0)
        one = calibrate.estimate(
            Scores(found.pool, found.planted, np.array([digits(fold) for fold in scores])), calibrate.auroc
        )
        inside += one.low <= value <= one.high
    assert inside >= 50


def test_gates_drop_what_lies_outside():
    random = np.random.default_rng(0)
    losses = random.exponential(2, (FOLDS, 500)).astype(np.float32)
    losses[0, :3] = 2.0  # just at a gate: outside
    at = np.array([digits(-fold) for fold in losses])
    for row in calibrate.dropped_by_gate(Scores(at.sum(0), at, at), (1.0, 2.0, 3.0, 6.0)):
        assert row["planted_dropped"]["value"] == pytest.approx((losses >= row["gate"]).mean())


def test_the_bound_falls_with_the_root_of_the_tokens():
    assert calibrate.bound_term(10_000) == pytest.approx(np.sqrt(2 * np.log(80) / 10_000))
    assert calibrate.bound_term(100) == pytest.approx(10 * calibrate.bound_term(10_000))


def test_auroc_of_more_pairs_than_an_integer_holds():
    many = np.array([0, 5_000_000_000, 5_000_000_000, 0])
    assert calibrate.auroc(many, many) == pytest.approx(0.5)
