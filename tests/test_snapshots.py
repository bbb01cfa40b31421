"""Snapshots of an input that grows, night by night, on a real Ray: what they say of each other, and who may publish."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import chat, write_rows
from test_rounds import masked_rows, read, some_rows

from tokenclean_ray import cli, metrics, rounds, snapshots
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError
from tokenclean_ray.finished import open_finished
from tokenclean_ray.layout import Store
from tokenclean_ray.snapshots import claim_snapshot, finish_snapshot


@pytest.fixture
def nights(tmp_path, model_pair, ray_session):
    """The folder of an input and a run over it; `clean(**select)` is a night."""
    folder = tmp_path

    def clean(held_out=None, **select):
        values = {
            "output": str(folder / "run"),
            "data": {"path": str(folder / "in" / "*.jsonl"), "part_bytes": 4096, "held_out": held_out},
            "model": {"base": model_pair[0], "reference": model_pair[1]},
            "select": select or {"scorer": "excess_loss"},
        }
        return rounds.clean(build_config(values))

    return SimpleNamespace(folder=folder, store=Store(str(folder / "run")), clean=clean)


def append(path, rows):
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def stamps(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in Path(folder).glob(pattern)}


def by_id(record):
    """A row's id → the kept places among its tokens; ids are the input's own."""
    masked = {key: row["labels"] for key, row in masked_rows(record).items()}
    parts = json.loads(
        Path(record["config"]["output"], "masked", record["result"]["snapshot"], "manifest.json").read_text()
    )
    return {
        int(row["id"]): {t for t, label in enumerate(masked.get((row["part"], row["row"]), ())) if label != -100}
        for row in read(record, "encoded")
        if row["part"] in parts["parts"]
    }


def test_nights_over_an_input_that_grows_and_shrinks(nights, capfd):
    source = nights.folder / "in"
    for name, first in (("a", 0), ("b", 1000)):
        rows = some_rows(40, seed=first)
        write_rows(source / f"{name}.jsonl", [row | {"id": first + n} for n, row in enumerate(rows)])
    first = nights.clean()
    assert first["changes"] is None
    kept_before = by_id(first)
    published = stamps(nights.folder, "run/masked/v0001/*")
    losses = stamps(nights.folder, "run/losses/*/*.parquet")

    # one file grows, one comes, whose rows are of another kind
    append(source / "b.jsonl", [row | {"id": 2000 + n} for n, row in enumerate(some_rows(7, seed=5))])
    strange = [chat("the", "dog " * (n % 5 + 20)) | {"id": 3000 + n, "source": "s0"} for n in range(60)]
    write_rows(source / "c.jsonl", strange)
    capfd.readouterr()
    second = nights.clean(scorer="excess_loss", warn_drift=0.05)
    kept = by_id(second)
    both = kept.keys() & kept_before.keys()
    drift = second["changes"].pop("drift")
    assert second["changes"] == {
        "since": "v0001",
        "rows_new": 67,
        "rows_removed": 0,
        "rows_unchanged": 80,
        "labels_gained": sum(len(kept[i] - kept_before[i]) for i in both),
        "labels_lost": sum(len(kept_before[i] - kept[i]) for i in both),
    }
    assert second["changes"]["labels_gained"] + second["changes"]["labels_lost"] > 0
    assert 0.05 < drift <= 1
    assert "warning: scores of the 67 new rows lie" in capfd.readouterr().err
    assert json.loads((nights.folder / "run/masked/v0002/changes.json").read_text()) == second["changes"] | {
        "drift": drift
    }
    # the older snapshot is as it was, and no old part was scored again
    assert stamps(nights.folder, "run/masked/v0001/*") == published
    assert {path: path.stat().st_mtime_ns for path in losses} == losses
    scored = stamps(nights.folder, "run/losses/*/*.parquet").keys() - losses.keys()
    assert 0 < len(scored) < len(losses)

    # a file goes, and the cut of the second night is kept: no label of what stays changes
    (source / "a.jsonl").unlink()
    cut = str(nights.folder / "run" / "selections" / second["result"]["selection"])
    capfd.readouterr()
    third = nights.clean(scorer="excess_loss", cut=cut)
    assert "warning" not in capfd.readouterr().err
    assert third["changes"] == {
        "since": "v0002",
        "rows_new": 0,
        "rows_removed": 40,
        "rows_unchanged": 107,
        "labels_gained": 0,
        "labels_lost": 0,
        "drift": None,
    }
    assert third["threshold"]["cut"] == second["threshold"]["cut"]
    assert third["result"]["snapshot"] == "v0003"
    kept_now = by_id(third)
    assert kept_now == {i: kept[i] for i in kept if i >= 1000}
    assert third["threshold"]["k"] == sum(map(len, kept_now.values()))

    # nothing has changed: nothing is written but the record
    before = stamps(nights.folder, "run/masked/**/*.parquet")
    again = nights.clean(scorer="excess_loss", cut=cut)
    assert (again["result"], again["changes"]) == (third["result"], third["changes"])
    assert stamps(nights.folder, "run/masked/**/*.parquet") == before
    assert nights.store.read_json("masked/latest.json")["snapshot"] == "v0003"


@pytest.mark.parametrize(
    ("drift", "new", "known", "limit", "warned"),
    [
        (0.11, 1000, 1000, 0.1, True),
        (0.09, 1000, 1000, 0.1, False),  # within the limit, though beyond chance
        (0.08, 1000, 1000, 0.05, True),
        (0.07, 1000, 1000, 0.05, False),  # equal distributions are 0.073 apart once in a hundred
        (0.7, 4, 1000, 0.1, False),  # 0.82 of so few new rows
        (0.9, 4, 1000, 0.1, True),
        (0.7, 1000, 4, 0.1, False),
        (None, 0, 1000, 0.1, False),
    ],
)
def test_a_drift_beyond_the_limit_and_beyond_chance_is_warned_of(monkeypatch, capsys, drift, new, known, limit, warned):
    counted = []
    monkeypatch.setattr(metrics.DRIFT, "set", counted.append)
    run = SimpleNamespace(config=SimpleNamespace(select=SimpleNamespace(warn_drift=limit)))
    snapshots._warn(run, {"drift": drift, "rows_new": new, "rows_unchanged": known})
    said = capsys.readouterr().err
    assert ("warning: scores of" in said) == warned
    assert warned == (f"of the {new:,} new rows lie {drift or 0:.2f} from" in said)
    assert counted == ([] if drift is None else [drift])


def test_a_cut_is_kept_only_for_the_scores_that_it_was_found_on(nights, model_pair):
    source = nights.folder / "in"
    write_rows(source / "b.jsonl", some_rows(20))
    folder = f"{nights.store.url}/selections"
    cut = f"{folder}/{nights.clean()['result']['selection']}"
    with pytest.raises(UserError, match=r"select.keep_ratio is 0.3, but select.cut was found with 0.6: leave"):
        nights.clean(scorer="excess_loss", cut=cut, keep_ratio=0.3)
    with pytest.raises(UserError, match=r"select.scorer is base_loss, but select.cut was found with excess_loss"):
        nights.clean(cut=cut, scorer="base_loss")
    with pytest.raises(UserError, match=r"nowhere has no threshold.json: name a folder selections/<name>"):
        nights.clean(cut=str(nights.folder / "nowhere"))
    per_row = nights.clean(scorer="excess_loss", scope="sample")["result"]["selection"]
    with pytest.raises(UserError, match="each row has its own cut, so there is none to keep"):
        nights.clean(cut=f"{folder}/{per_row}")
    by_source = f"{folder}/{nights.clean(scorer='excess_loss', scope='source')['result']['selection']}"
    swapped = {"base": model_pair[1], "reference": model_pair[0]}
    other = {"output": str(nights.folder / "other"), "data": {"path": str(source / "*.jsonl")}, "model": swapped}
    with pytest.raises(UserError, match=r"was found on losses/.*the base of this run gives losses/.*leave select.cut"):
        rounds.clean(build_config(other | {"select": {"cut": cut}}))
    # what the scorer read beside the losses follows from the cut, too
    gate = {"scorer": "gated_excess_loss", "gate": 40, "gate_on": "rank"}
    gated = nights.clean(**gate)
    append(source / "b.jsonl", [chat("the fox", "the dog") | {"id": 9000, "source": "another"}])
    kept = nights.clean(cut=f"{folder}/{gated['result']['selection']}")
    assert kept["threshold"]["losses"] == gated["threshold"]["losses"]
    assert kept["threshold"]["cut"] == gated["threshold"]["cut"]
    assert (kept["changes"]["rows_new"], kept["changes"]["rows_unchanged"]) == (1, 20)
    with pytest.raises(UserError, match=r"select.cut has none for the source another"):
        nights.clean(cut=by_source)


def test_what_an_older_version_or_a_damaged_snapshot_leaves_out_does_not_stop_a_night(nights, capfd):
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", some_rows(20))
    nights.clean()
    encoded = nights.store.part_names("encoded")
    for part in encoded:  # before files were noted
        summary = nights.store.read_summary("encoded", part)
        nights.store.write_part("encoded", part, nights.store.read_part("encoded", part), {
            key: value for key, value in summary.items() if key not in ("file", "part")
        })  # fmt: skip
    append(source / "a.jsonl", some_rows(3, seed=7))
    changes = nights.clean()["changes"]
    assert changes["rows_new"] - changes["rows_removed"] == 3
    (nights.folder / "run/masked/v0002" / f"{min(nights.store.part_names('masked/v0002'))}.parquet").write_bytes(
        b"PAR1"
    )
    append(source / "a.jsonl", some_rows(3, seed=8))
    third = nights.clean()
    assert third["changes"] is None
    assert third["result"]["snapshot"] == "v0003"
    assert "it is not known what has changed since" in capfd.readouterr().err


@pytest.mark.parametrize("gone", ["run/encoded", "run/masked/v0001"])
def test_where_files_of_the_last_snapshot_are_gone_nothing_is_said_of_changes(nights, capfd, gone):
    """Rows that cannot be compared are neither new nor removed."""
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", some_rows(20))
    write_rows(source / "b.jsonl", some_rows(20, seed=1))
    nights.clean()
    for path in (nights.folder / gone).glob("*.parquet"):
        path.unlink()
    append(source / "b.jsonl", some_rows(3, seed=8))
    second = nights.clean(scorer="excess_loss", keep_ratio=0.5)
    assert second["changes"] is None
    assert second["result"]["snapshot"] == "v0002"
    assert "so it is not known what has changed since" in capfd.readouterr().err


def test_a_newest_snapshot_without_its_manifest_is_published_again_with_its_changes(nights):
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", some_rows(20))
    nights.clean()
    append(source / "a.jsonl", some_rows(3, seed=8))
    second = nights.clean()
    (nights.folder / "run/masked/v0002/manifest.json").unlink()
    assert nights.clean()["changes"] == second["changes"]
    assert open_finished(str(nights.folder / "run")).snapshot == "masked/v0002"


def test_a_cut_of_this_run_is_kept_where_its_losses_were_made_again(nights, capfd):
    """On other hardware they have other last bits, so that another number of tokens is kept: the cut still stands."""
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", some_rows(20))
    first = nights.clean()
    append(source / "a.jsonl", some_rows(3, seed=8))
    cut = f"{nights.store.url}/selections/{first['result']['selection']}"
    kept = nights.clean(cut=cut)
    file = f"{kept['result']['selection']}/threshold.json"
    threshold = nights.store.read_json(f"selections/{file}")
    nights.store.write_json(f"selections/{file}", threshold | {"k": threshold["k"] + 5})
    for path in (nights.folder / "run/masked/v0002").glob("*"):
        path.unlink()
    again = nights.clean(cut=f"{nights.store.url}/selections/{file}")
    assert again["threshold"]["k"] == threshold["k"]
    assert again["threshold"]["cut"] == first["threshold"]["cut"]
    assert f"{threshold['k']} tokens kept instead of {threshold['k'] + 5}" in capfd.readouterr().err


def test_readers_of_a_run_that_lost_files_say_what_mends_it(nights, capsys):
    write_rows(nights.folder / "in" / "a.jsonl", some_rows(20))
    first = nights.clean()
    capsys.readouterr()
    run = nights.folder / "run"
    folders = ("encoded", "masked/v0001", first["threshold"]["losses"]["base"])
    encoded, masked, losses = (min((run / folder).glob("*.parquet")) for folder in folders)
    threshold = run / "selections" / first["result"]["selection"] / "threshold.json"
    counted = ("kept", "near", "ties", "sources")  # found again, then the run was stopped
    not_counted = json.dumps({k: v for k, v in first["threshold"].items() if k not in counted}).encode()
    content = masked.read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 3] ^= 255  # in a page, of which the footer knows nothing
    for n, (file, broken, command) in enumerate((
        (encoded, b"", ["report"]),
        (encoded, None, ["report"]),
        (encoded, None, ["inspect"]),
        (losses, losses.read_bytes()[:-40], ["report"]),
        (losses, None, ["inspect"]),
        (masked, b"PAR1", ["export", "--to", "trl"]),
        (masked, flipped, ["export", "--to", "trl"]),
        (masked, None, ["export", "--to", "hf"]),
        (threshold, not_counted, ["report"]),
        (threshold, b"{", ["inspect"]),
        (run / "run.json", b"{", ["report"]),
    )):  # fmt: skip
        out = ["--out", str(nights.folder / f"export-{n}")] if command[0] == "export" else []
        file.unlink()
        if broken is not None:
            file.write_bytes(broken)
        assert cli.main([command[0], str(run), *command[1:], *out]) == 2
        line = capsys.readouterr().err
        assert line.startswith("tokenclean: error: "), line
        assert line.endswith("clean the data again\n"), line
        if "delete it, then" in line:
            assert str(file) in line
            file.unlink()
        assert nights.clean()["result"] == first["result"]
        assert cli.main([command[0], str(run), *command[1:], *out]) == 0
        assert masked.read_bytes() == content
        capsys.readouterr()


def test_two_selections_never_share_a_snapshot(tmp_path):
    """Claims of several runs at once, as where a lock was lost: one number each, and the same again for the same."""
    run = SimpleNamespace(store=Store(str(tmp_path)))
    names = [f"s{n}" for n in range(8)] * 2
    with ThreadPoolExecutor(16) as pool:
        claimed = dict(zip(names, pool.map(lambda name: claim_snapshot(run, name), names), strict=True))
    assert len(set(claimed.values())) >= 8
    again = {name: claim_snapshot(run, name) for name in claimed}
    assert len(set(again.values())) == 8
    for name, snapshot in again.items():
        assert run.store.read_json(f"masked/{snapshot}/claim.json") == {"selection": name}


def test_the_number_of_a_snapshot_that_was_deleted_is_not_given_again(tmp_path, model_pair):
    """latest.json may still name it, and would then name a half-written one."""
    run = SimpleNamespace(store=Store(str(tmp_path)))
    claim_snapshot(run, "first")
    run.store.write_json("masked/latest.json", {"snapshot": "v0003", "selection": "third"})
    assert claim_snapshot(run, "fourth") == "v0004"
    for data, why in (
        ("", "masked/v0003, the newest, has no manifest.json: clean the data again"),
        ("/masked/latest.json", "latest.json is a file: name its folder"),
    ):
        training = {"output": str(tmp_path / "out"), "train": {"data": f"{tmp_path}{data}", "model": model_pair[0]}}
        with pytest.raises(UserError, match=why):
            rounds.train(build_config(training, "train"))


def test_rows_that_were_lost_are_not_published(nights, monkeypatch):
    write_rows(nights.folder / "in" / "a.jsonl", some_rows(40))
    mask = rounds.mask
    monkeypatch.setattr(rounds, "mask", lambda *arguments: mask(*arguments)[1:])
    with pytest.raises(AssertionError, match="rows were lost or doubled"):
        nights.clean()
    assert nights.store.read_json("masked/latest.json") is None
    monkeypatch.undo()
    assert nights.clean()["result"]["snapshot"] == "v0001"


def test_a_cut_of_every_source_is_kept_too(nights):
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", some_rows(40))
    by_source = nights.clean(scorer="excess_loss", scope="source", keep_ratio=0.4)
    cut = f"{nights.store.url}/selections/{by_source['result']['selection']}/threshold.json"  # the file will do, too
    append(source / "a.jsonl", some_rows(20, seed=9))
    kept = nights.clean(cut=cut)
    assert {name: found["cut"] for name, found in kept["threshold"]["cuts"].items()} == {
        name: found["cut"] for name, found in by_source["threshold"]["cuts"].items()
    }
    assert (kept["changes"]["rows_new"], kept["changes"]["labels_gained"], kept["changes"]["labels_lost"]) == (20, 0, 0)


def test_a_snapshot_that_another_run_wrote_to_is_not_published(tmp_path):
    run = SimpleNamespace(store=Store(str(tmp_path)), lock=SimpleNamespace(check=lambda: None))
    snapshot = claim_snapshot(run, "mine")
    run.store.write_json(f"masked/{snapshot}/claim.json", {"selection": "theirs"})
    with pytest.raises(UserError, match="v0001 is now another run's"):
        finish_snapshot(run, snapshot, "mine", [])
    assert run.store.names("masked") == [snapshot]


def test_columns_are_carried_in_the_types_that_all_files_need(nights):
    """A file with other ids comes: what was there is masked again, but neither encoded nor scored."""
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", [row | {"id": n} for n, row in enumerate(some_rows(10))])
    first = nights.clean()
    made = stamps(nights.folder, "run/encoded/*.parquet") | stamps(nights.folder, "run/losses/*/*.parquet")
    write_rows(source / "b.jsonl", [row | {"id": f"b{n}"} for n, row in enumerate(some_rows(10, seed=1))])
    second = nights.clean()
    assert second["changes"]["rows_unchanged"] == first["counts"]["masked"]
    still = stamps(nights.folder, "run/encoded/*.parquet") | stamps(nights.folder, "run/losses/*/*.parquet")
    assert made.items() <= still.items()
    tables = [pq.read_table(path) for path in (nights.folder / "run/masked/v0002").glob("*.parquet")]
    rows = pa.concat_tables(tables)  # of one schema
    assert set(rows["id"].to_pylist()) <= {str(n) for n in range(10)} | {f"b{n}" for n in range(10)}
    assert len(rows) == second["counts"]["masked"] > first["counts"]["masked"]


def test_clean_rows_that_are_of_the_pool_too_leave_its_columns_as_they_are(nights):
    """The clean file alone has numbers for ids, all files together have texts."""
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", [row | {"id": n} for n, row in enumerate(some_rows(40))])
    write_rows(source / "b.jsonl", [row | {"id": f"b{n}"} for n, row in enumerate(some_rows(10, seed=1))])
    held_out = str(source / "a.jsonl")
    first = nights.clean(held_out, gate="auto")
    tables = [pq.read_table(path) for path in (nights.folder / "run/masked/v0001").glob("*.parquet")]
    assert {str(table.schema.field("id").type) for table in tables} == {"string"}
    before = stamps(nights.folder, "run/encoded/*.parquet")
    assert nights.clean(held_out, gate="auto")["result"] == first["result"]
    assert stamps(nights.folder, "run/encoded/*.parquet") == before


def test_a_night_that_fails_leaves_the_last_one_to_read(nights):
    source = nights.folder / "in"
    write_rows(source / "a.jsonl", some_rows(10))
    nights.clean()
    append(source / "a.jsonl", [{"messages": []}] * 5)
    with pytest.raises(UserError, match="15 rows cannot be used"):
        nights.clean()
    assert open_finished(str(nights.folder / "run")).snapshot == "masked/v0001"
