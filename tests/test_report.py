"""The report: its figures are counts of the run, and a real browser shows it, filters it and asks for nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Handler, chat, serving, wait_for
from test_rounds import config_for, kept_set, read, some_rows

from tokenclean_ray import report, report_data, rounds
from tokenclean_ray.errors import UserError
from tokenclean_ray.finished import open_finished, read_scored, row_tokens, sample_parts, texts, visible
from tokenclean_ray.report_data import gather

pytestmark = pytest.mark.usefixtures("ray_session")

HOSTILE = "</script><script>window.hacked=1</script><img src=http://127.0.0.1:1/x onerror='window.hacked=1'>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, model_pair):
    """A run over rows that would like to be more than text: its report's path and structure, what it kept."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = some_rows(110)
    rows += [chat("q " + HOSTILE, f"sure \u202egnirts\u202c {HOSTILE} שלום 🦊") | {"source": HOSTILE} for _ in range(3)]
    rows[-1]["messages"] += chat("again", "a second answer")["messages"]
    rows.insert(5, {"messages": []})
    config = config_for(folder, model_pair, rows)
    record = rounds.clean(config)
    path, run = report.write_report(config.output), open_finished(config.output)
    return SimpleNamespace(path=path, data=gather(run), record=record, run=run, kept=kept_set(record))


def test_the_figures_are_counts_of_the_run(hostile):
    data, record, kept = hostile.data, hostile.record, hostile.kept
    response = sum(sum(row["response_mask"]) for row in read(record, "encoded"))
    counts, sample = data["counts"], data["sample"]
    assert (counts["kept"], counts["dropped"], counts["selected"]) == (len(kept), response - len(kept), response)
    assert (counts["rows"], counts["rejected"], counts["masked"]) == (114, 1, 113)
    assert counts["reasons"] == [{"reason": "messages is empty", "rows": 1}]
    assert sample["parts"] == sample["of_parts"]  # a small run is its own sample, so the rest can be counted too
    assert sample["response_tokens"] == response
    assert sum(bin["kept"] for bin in data["scores"]["bins"]) == len(kept)
    assert sum(bin["dropped"] for bin in data["scores"]["bins"]) == counts["dropped"]
    assert sum(cell["tokens"] for cell in data["losses"]) == response
    for shares in (data["places"], data["turns"], data["sources"]):
        assert sum(group["tokens"] for group in shares) == response
        assert sum(group["kept"] for group in shares) == len(kept)
    rows = {(row["part"], row["row"]): row["labels"] for row in read(record, data["result"].partition("run/")[2])}
    for example in data["examples"]:
        labels = rows[example["part"], example["row"]]
        assert example["kept"] == sum(label != -100 for label in labels)


def test_example_rows_show_the_fate_and_the_losses_of_each_token(hostile):
    rows = {(row["part"], row["row"]): row for row in read(hostile.record, "encoded")}
    folders = [hostile.record["threshold"]["losses"][name] for name in ("base", "reference")]
    losses = [{(row["part"], row["row"]): row["loss"] for row in read(hostile.record, f)} for f in folders]
    for example in hostile.data["examples"]:
        place = example["part"], example["row"]
        at = [t for t, inside in enumerate(rows[place]["response_mask"]) if inside]
        pieces = [piece[1:] for piece in example["pieces"] if isinstance(piece, list)]
        base, reference = (np.array([of[place][t] for t in at]) for of in losses)
        fate = [(*place, t) in hostile.kept for t in at]
        np.testing.assert_allclose(pieces, np.stack([fate, base - reference, base, reference], 1), 1e-3, 1e-3)


def test_the_rows_that_lost_most_are_among_the_examples(hostile, monkeypatch):
    monkeypatch.setattr(report_data, "NUM_EXAMPLES", 12)  # fewer than a part has rows
    shares = {}
    for row in read(hostile.record, "encoded"):
        place = row["part"], row["row"]
        at = [t for t, inside in enumerate(row["response_mask"]) if inside]
        shares[place] = sum((*place, t) in hostile.kept for t in at) / len(at)
    examples = gather(hostile.run)["examples"]
    third = sorted(shares.values())[2]
    most = {place for place, share in shares.items() if share < third}
    assert most
    assert most <= {(example["part"], example["row"]) for example in examples}


def test_sources_beyond_the_largest_are_one(hostile, monkeypatch):
    monkeypatch.setattr(report_data, "MAX_SOURCES", 2)
    *largest, others = gather(hostile.run)["sources"]
    assert largest == hostile.data["sources"][:2]
    rest = hostile.data["sources"][2:]
    assert others == {
        "name": f"{len(rest)} other sources",
        "tokens": sum(source["tokens"] for source in rest),
        "kept": sum(source["kept"] for source in rest),
    }


def test_a_large_run_is_read_in_part(hostile):
    run = hostile.run
    (chosen,) = run.selections
    folders = ["encoded", *chosen.threshold["losses"].values()]
    sizes = {part: sum(run.store.size(f"{folder}/{part}.parquet") for folder in folders) for part in chosen.parts}
    budget = sum(sizes.values()) // 2
    read = [scored.tokens.part for scored in sample_parts(run, budget)]
    assert 1 < len(set(read)) == len(read) < len(sizes)
    assert sum(sizes[part] for part in read) <= budget
    assert len(list(sample_parts(run, 1))) == 1


def test_places_and_turns_against_plain_loops(hostile):
    turns, first = {}, [0, 0]
    for row in read(hostile.record, "encoded"):
        turn, place = -1, 0
        for t, inside in enumerate(row["response_mask"]):
            if not inside:
                continue
            place = place + 1 if row["response_mask"][t - 1] else 0
            turn += place == 0
            keep = (row["part"], row["row"], t) in hostile.kept
            turns.setdefault(str(turn + 1), [0, 0])
            for total in (turns[str(turn + 1)], first if place == 0 else [0, 0]):
                total[0] += 1
                total[1] += keep
    assert {g["name"]: [g["tokens"], g["kept"]] for g in hostile.data["turns"]} == turns
    assert len(turns) == 2
    assert [hostile.data["places"][0][of] for of in ("tokens", "kept")] == first


def test_a_row_reads_as_its_text(hostile):
    finished = hostile.run
    chosen = finished.selections[0]
    for part in chosen.parts:
        scored = read_scored(finished, chosen, part)
        for row in range(scored.tokens.encoded.num_rows):
            pieces = row_tokens(finished, scored, row)
            ids = scored.tokens.encoded["input_ids"][row].as_py()
            whole = "".join(p if isinstance(p, str) else p["text"] for p in pieces)
            assert whole == visible(finished.tokenizer.decode(ids))
            figures = [p for p in pieces if not isinstance(p, str)]
            of_row = scored.tokens.row == row
            assert [p["keep"] for p in figures] == scored.keep[of_row].tolist()
            np.testing.assert_allclose(
                [p["base"] - p["reference"] for p in figures], scored.tokens.score[of_row], 1e-4, 1e-4
            )


def test_texts_of_tokens_that_are_parts_of_characters(tokenizer):
    ids = tokenizer("a 🦊 fox")["input_ids"]
    found = texts(tokenizer, ids)
    assert "".join(found) == "a 🦊 fox"
    assert len(found) == len(ids)
    broken = [ids[2]] * 12  # a byte that never becomes a character
    assert "".join(texts(tokenizer, broken)).strip("\ufffd") == tokenizer.decode(broken).strip("\ufffd")


def test_more_examples_than_fit_are_left_out(hostile, monkeypatch):
    size = Path(hostile.path).stat().st_size
    assert size < report.MAX_BYTES
    monkeypatch.setattr(report, "MAX_BYTES", size - 1000)
    assert len(report.page(hostile.data)) < report.MAX_BYTES


def test_what_is_no_finished_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report.write_report(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has not ended"):
        report.write_report(str(tmp_path))
    (tmp_path / "run.json").write_text('{"result": {"snapshot": "v0001"}}')
    with pytest.raises(UserError, match=r"v0001 has no manifest\.json"):
        report.write_report(str(tmp_path))


# -- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser, hostile):
    """The report, drawn."""
    open_page(browser, hostile.path)
    return browser


def open_page(browser, path):
    browser.get(f"file://{path}")
    counts = "return ['.chart', '.chart svg'].map(s => document.querySelectorAll(s).length)"
    wait_for(lambda: len(set(found := browser.execute_script(counts))) == 1 and found[0])


def all_text(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )


def change(browser, id, value):
    """Give a control a value, as a user would."""
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(script + "e.dispatchEvent(new Event('input'))", id, value)


def test_it_draws_without_an_error(page):
    charts = all_text(page, ".chart")
    assert len(charts) >= 5
    assert all(charts)
    assert "113" in all_text(page, ".tile b")
    assert all_text(page, "#scores-and-the-cut p")[0].startswith("Of all ")  # a small run is its own sample
    severe = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_a_round_that_gave_no_number_does_not_stop_the_page(browser, hostile, tmp_path):
    nan = float("nan")
    held = {"loss": nan, "standard_error": nan}
    outcome = {"plan": "self_evolving", "round": 1, "kept_share": 0.6, "tokens_trained": 1, "accepted": False}
    outcome |= {"held_out": held, "threshold": nan}
    plan = {"plan": "self_evolving", "rounds": 1, "accepted": 0, "held_out_loss": nan, "standard_error": nan}
    plan |= {"kept_share": 0.6, "tokens_trained": 1, "seconds": nan}
    path = tmp_path / "report.html"
    path.write_bytes(report.page(hostile.data | {"rounds": [outcome], "comparison": [plan]}))
    open_page(browser, path)
    assert "–" in all_text(browser, "#rounds-side-by-side td")
    assert all_text(browser, "#rows .text")


def test_hostile_text_is_text(page, hostile):
    page.execute_script("document.querySelector('#more').click()")
    assert page.execute_script("return window.hacked") is None
    built = "return document.querySelectorAll('#rows script, #rows img, #cards b, #cards img').length"
    assert page.execute_script(built) == 0
    assert any(HOSTILE[:60] in text for text in all_text(page, "td"))
    assert any(text.startswith(HOSTILE[:60]) for text in all_text(page, "#source option"))
    change(page, "source", HOSTILE)
    shown = all_text(page, "#rows .text")
    assert shown
    for text in shown:
        assert HOSTILE in text
        assert "⟨U+202E⟩gnirts⟨U+202C⟩" in text
        assert "שלום 🦊" in text
        assert "\u202e" not in text
    texts = "[...document.querySelectorAll('#rows .text, #rows .meta bdi')]"
    assert set(page.execute_script(f"return {texts}.map(e => getComputedStyle(e).unicodeBidi)")) == {"isolate"}


def test_hostile_text_is_text_in_a_chart_s_tooltip(page):
    from selenium.webdriver import ActionChains

    bars = page.find_elements("css selector", "#kept-share-by-source .mark-rect path")
    labels = [bar.get_attribute("aria-label") for bar in bars]
    bar = next(bar for bar, label in zip(bars, labels, strict=True) if "<script>" in label)
    ActionChains(page).move_to_element(bar).perform()
    wait_for(lambda: HOSTILE[:40] in "".join(all_text(page, "#vg-tooltip-element")))
    assert page.execute_script("return document.querySelectorAll('#vg-tooltip-element :is(script, img)').length") == 0
    assert page.execute_script("return window.hacked") is None


def test_filters_and_search(page, hostile):
    examples = hostile.data["examples"]

    def choose(id, value):
        change(page, id, value)
        return all_text(page, "#found")[0]

    of_s1 = sum(e["source"] == "s1" for e in examples)
    assert 0 < of_s1 < len(examples)
    assert choose("source", "s1").startswith(f"{of_s1} of the {len(examples)} ")
    assert set(all_text(page, "#rows .meta span:first-child")) == {"s1"}
    choose("source", "")
    shares = sorted(e["kept"] / e["tokens"] for e in examples)
    for order, expected in (("most", shares[0]), ("least", shares[-1])):
        choose("order", order)
        assert f"{100 * expected:.1f} %" in all_text(page, "#rows .meta")[0]
    with_again = sum("again" in json.dumps(e["pieces"]) for e in examples)
    assert choose("search", "AGAIN").startswith(f"{with_again} of ")
    assert choose("search", "nowhere at all").startswith("0 of ")


def test_figures_by_pointer_and_by_keyboard(page):
    from selenium.webdriver import ActionChains, Keys

    tip = page.find_element("id", "tip")
    page.execute_script("document.querySelector('#rows .text').focus({preventScroll: false})")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    wait_for(tip.is_displayed)
    first = tip.text
    assert "score" in first
    assert "base" in first
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    wait_for(lambda: tip.text != first)
    page.execute_script("scrollBy(0, 5)")  # as a focus out of sight does
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert tip.is_displayed()
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    wait_for(lambda: not tip.is_displayed())
    ActionChains(page).move_to_element(page.find_element("css selector", "#rows .tok")).perform()
    wait_for(tip.is_displayed)


@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_a_phone_and_a_desk(browser, hostile, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(browser, hostile.path)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_mode(page):
    def colours(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        asked = [("body", "backgroundColor"), ("body", "color"), (".chart svg text", "fill")]
        return [page.execute_script(style, *what) for what in asked]

    light, dark = colours("light"), colours("dark")
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert light[1] == light[2]
    assert dark[1] == dark[2]


def test_no_request_leaves_the_page(browser, hostile):
    asked = []

    class Listener(Handler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    browser.get_log("performance")  # what came before
    open_page(browser, hostile.path)
    fetch = "fetch(arguments[0], {mode: 'no-cors'}).then(() => arguments[1]('sent'), () => arguments[1]('refused'))"
    image = (
        "const done = arguments[1], i = new Image(); i.onload = i.onerror = () => done('over'); i.src = arguments[0]"
    )
    with serving(Listener) as address:
        url = f"http://{address}/"
        assert browser.execute_async_script(fetch, url) == "refused"
        browser.execute_async_script(image, url)
    assert asked == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls[0].startswith("file://")
    assert {u.partition(":")[0] for u in urls if not u.startswith(url)} <= {"file", "data"}
