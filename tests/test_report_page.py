"""What the report shows, in a real browser, against figures made up by hand."""

import pytest
from test_report import all_text, open_page

from tokenclean_ray import report


def example(source, pieces, number=0):
    """A row; pieces are (text, kept, score, base, reference)."""
    row = {"part": "part-0", "row": number, "round": None, "source": source, "tokens": len(pieces)}
    return row | {"kept": sum(piece[1] for piece in pieces), "cut_short": False, "pieces": ["asked: ", *pieces]}


DATA = {
    "run": "runs/made-up", "result": "runs/made-up/masked/v0001", "tokenclean": "0.1.0",
    "models": {"base": "models/base", "reference": "models/reference"},
    "select": {"scorer": "excess_loss", "scope": "source", "keep_ratio": 0.6},
    "counts": {"rows": 1000, "masked": 900, "nothing_kept": 40, "rejected": 60, "tokens": 50000, "selected": 20000,
               "kept": 12500, "dropped": 7500, "near": 7, "ties": 1, "reasons": [{"reason": "too long", "rows": 60}]},
    "cuts": [{"round": None, "source": "a", "score": -0.5}, {"round": None, "source": "b", "score": 1.5}],
    "near": 0.001,
    "sources": [{"name": "b", "tokens": 15000, "kept": 8500}, {"name": "a", "tokens": 5000, "kept": 4000}],
    "sample": {"seed": 0, "parts": 3, "of_parts": 9, "rows": 12, "response_tokens": 20000},
    "scores": {"bins": [{"low": -2.0, "high": 0.0, "kept": 10, "dropped": 30},
                        {"low": 0.0, "high": 2.0, "kept": 40, "dropped": 20}], "ruled_out": 0},
    "losses": [{"base": 0.5, "reference": 1.5, "step": 0.5, "tokens": 30, "share": 0.2}],
    "places": [{"name": "1", "tokens": 20000, "kept": 12500}], "turns": [{"name": "1", "tokens": 20000, "kept": 12500}],
    "tokens": {"kept": [{"token": "good", "seen": 50, "kept": 40, "score": 1.25}],
               "dropped": [{"token": "bad", "seen": 80, "kept": 20, "score": -1.25}]},
    "rounds": [], "curves": [], "comparison": [], "calibration": None,
    "examples": [
        example("a", [[" near", 1, -0.5, 1.0, 1.5], [" off", 1, 0.5, 2.0, 1.5], [" far", 1, 1.5, 2.0, 0.5]]),
        example("b", [[" near", 1, 1.5, 2.0, 0.5], [" off", 0, 0.5, 2.0, 1.5], [" far", 0, -0.5, 1.0, 1.5]], 1),
        *[example("b", [], number) for number in range(2, 12)],
    ],
}  # fmt: skip


CALIBRATION = {  # as `settle` writes it
    "settings": {"share": 0.01, "replaced": 0.1, "seed": 0},
    "rows": 43,
    "planted": 1234,
    "genuine": 4321,
    "auroc": {"value": 0.91, "low": 0.9, "high": 0.92},
    "noise_share": 0.166,
    "largest_ratio": 0.85,
    "ratios": [
        {
            "ratio": ratio,
            "planted_dropped": {"value": 1 - ratio / 4, "low": 0.8, "high": 1.0},
            "genuine_dropped": {"value": 1 - ratio, "low": 0.1, "high": 0.9},
            "noise_kept": ratio / 30,
        }
        for ratio in (0.2, 0.4, 0.6, 0.8)
    ],
    "auroc_random": {"value": 0.95, "low": 0.94, "high": 0.96},
    "auroc_other_rows": {"value": 0.87, "low": 0.85, "high": 0.89},
    "gate_on": "loss",
    "gates": [
        {
            "gate": 2.0,
            "planted_dropped": {"value": 0.7, "low": 0.65, "high": 0.75},
            "genuine_dropped": {"value": 0.1234, "low": 0.1, "high": 0.15},
        }
    ],
}


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """Drawn once, since that takes seconds; the last test changes it."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(report.page(DATA))
    open_page(browser, path)
    return browser


def marks(browser, card, kind):
    """What a chart's marks say of themselves to a screen reader."""
    found = browser.find_elements("css selector", f"#{card} .mark-{kind}.role-mark :is(path, line)")
    return [mark.get_attribute("aria-label") for mark in found]


def test_each_tile_has_its_own_count(page):
    assert dict(zip(all_text(page, ".tile span"), all_text(page, ".tile b"), strict=True)) == {
        "rows in": "1,000",
        "rows out": "900",
        "rows with nothing kept": "40",
        "rows rejected": "60",
        "tokens in": "50,000",
        "answer tokens judged": "20,000",
        "kept, 62.5 %": "12,500",
        "dropped, 37.5 %": "7,500",
    }


def test_the_scores_have_their_cuts(page):
    bars = [label.partition("; low")[0] for label in marks(page, "scores-and-the-cut", "rect")]
    assert bars == [
        f"score (excess_loss): {bin}; tokens: {tokens}; fate: {fate}"
        for bin, counts in (("−2 – 0", (10, 30)), ("0 – 2", (40, 20)))
        for fate, tokens in zip(("kept", "dropped"), counts, strict=True)
    ]
    assert marks(page, "scores-and-the-cut", "rule") == ["score: −0.5; label: cut of a", "score: 1.5; label: cut of b"]


def test_cells_lie_at_their_losses(page):
    (cell,) = marks(page, "base-against-reference-loss", "rect")
    assert cell.startswith("loss under the base (nats): 0.5; loss under the reference (nats): 1.5; ")
    assert "share: 20%; tokens: 30" in cell


def test_bars_are_kept_shares_beside_that_of_all(page):
    bars = [label.partition("; share")[0] for label in marks(page, "kept-share-by-source", "rect")]
    assert bars == ["kept share: 56.666667%; name: b", "kept share: 80.000000%; name: a"]
    assert marks(page, "kept-share-by-source", "rule") == ["all: 0.625"]


@pytest.mark.parametrize(("kind", "row"), [("kept", ["good", "50", "80.0 %"]), ("dropped", ["bad", "80", "25.0 %"])])
def test_tokens_stand_under_their_heading(page, kind, row):
    text, *figures = all_text(page, f"#tokens-most-often-{kind} td")
    assert [text.strip('"'), *figures[:2]] == row


def test_a_sample_is_called_one(page):
    captions = all_text(page, "#scores-and-the-cut p, #kept-share-by-place-in-the-answer p, #foot")
    assert len(captions) == 3
    assert all("rom a sample of 20,000 answer tokens (3 of 9 parts)." in text for text in captions)


def test_tokens_are_coloured_by_their_distance_from_the_cut_of_their_source(page):
    """Distances 0, 1 and 2 in both rows: the farthest has the full strength, 0.12 + 0.5."""
    strengths = "return [...document.querySelectorAll('#rows .tok')].map(e => e.style.getPropertyValue('--strength'))"
    assert page.execute_script(strengths) == ["0.12", "0.37", "0.62"] * 2


def test_dropped_tokens_are_struck_through(page):
    style = "return [...document.querySelectorAll('#rows .tok')].map(e => [e.textContent, getComputedStyle(e)])"
    style += ".map(([text, style]) => [text, style.textDecorationLine])"
    struck = [text for text, line in page.execute_script(style) if line == "line-through"]
    assert struck == [" off", " far"]
    assert all_text(page, "#rows .tok.dropped") == struck
    assert all_text(page, "#rows .tok.kept") == [" near", " off", " far", " near"]


def test_a_token_s_figures_are_its_own(page):
    shown = []
    for number in (2, 4):
        page.execute_script("document.querySelectorAll('#rows .tok')[arguments[0]].focus()", number)
        shown += all_text(page, "#tip")
    assert shown == [
        '" far"\nkept, score 1.5\nbase 2 nats\nreference 0.5 nats',
        '" off"\ndropped, score 0.5\nbase 2 nats\nreference 1.5 nats',
    ]


def test_more_rows_are_shown_when_asked_for(page):
    numbers = [f"part-0:{number}" for number in range(12)]
    for shown in (10, 12):
        assert all_text(page, "#rows .meta span:nth-child(2)") == numbers[:shown]
        assert page.find_element("id", "more").is_displayed() == (shown < 12)
        page.execute_script("document.getElementById('more').click()")


def test_a_calibration_is_told_in_words_and_shares(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_bytes(report.page(DATA | {"calibration": CALIBRATION}))
    open_page(browser, path)
    tables = browser.execute_script(
        "return [...document.querySelectorAll('#planted-calibration table')]"
        ".map(t => [...t.rows].map(row => [...row.cells].map(cell => cell.textContent)))"
    )
    figures, ratios, gates = tables
    assert [value for _, value in figures[1:]] == [
        *("1234", "43", "0.910 (0.900 to 0.920)", "0.950 (0.940 to 0.960)", "0.870 (0.850 to 0.890)", "16.6 %", "0.85"),
    ]
    assert ratios[0] == [
        "keep ratio",
        "planted tokens dropped",
        "genuine tokens dropped",
        "noise among the kept, at most",
    ]
    assert ratios[2] == ["0.4", "90.0 % (80.0 % to 100.0 %)", "60.0 % (10.0 % to 90.0 %)", "1.3 %"]
    assert gates[1] == ["2", "70.0 % (65.0 % to 75.0 %)", "12.3 % (10.0 % to 15.0 %)"]
    assert len(all_text(browser, "#planted-calibration .chart svg")) == 2


def test_a_calibration_of_an_older_version_is_shown_as_far_as_it_goes(browser, tmp_path):
    path = tmp_path / "report.html"
    older = {"planted": 12, "ratios": [{"ratio": 0.5, "planted_dropped": None}], "largest_ratio": None}
    path.write_bytes(report.page(DATA | {"calibration": older}))
    open_page(browser, path)
    cells = all_text(browser, "#planted-calibration td")
    assert cells[1:14:2] == ["12", *["–"] * 6]
    assert cells[14:] == ["0.5", "–", "–", "–"]
