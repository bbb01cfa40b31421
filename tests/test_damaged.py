"""Files of a run folder that are damaged, or of other losses: named, made again, and published as before."""

import json
import shutil
from types import SimpleNamespace

import pytest
from test_rounds import config_for, kept_set, masked_rows, some_rows

from tokenclean_ray import rounds
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Damaged, Store
from tokenclean_ray.run import with_repairs

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory, model_pair):
    """One undisturbed run, and its config."""
    config = config_for(tmp_path_factory.mktemp("cleaned"), model_pair, some_rows(120))
    return config, rounds.clean(config)


def copy_run(cleaned, tmp_path, **select):
    config, _ = cleaned
    shutil.copytree(config.output, tmp_path / "run")
    return config.model_copy(
        update={"output": str(tmp_path / "run"), "select": config.select.model_copy(update=select)}
    )


def damage_everything_before_the_selection(root, base, reference):
    """Returns what the run must name."""
    store = Store(str(root))
    truncated, foreign, rows, model, lost_losses, lost = sorted(store.part_names("encoded"))[:6]
    path = root / "encoded" / f"{truncated}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    shutil.copy(root / base / f"{truncated}.parquet", root / base / f"{foreign}.parquet")
    store.write_part(base, rows, store.read_part(base, rows).slice(1), {})
    shutil.copy(root / base / f"{model}.parquet", root / reference / f"{model}.parquet")
    (root / base / f"{lost_losses}.parquet").unlink()
    (root / "encoded" / f"{lost}.parquet").unlink()
    return [
        f"encoded/{truncated}.parquet is damaged",
        f"{base}/{foreign}.parquet is damaged (it belongs to another part)",
        f"{base}/{rows}.parquet is damaged (of other rows)",
        f"{reference}/{model}.parquet is damaged (it belongs to another folder)",
    ]


def test_damaged_intermediate_files_are_named_and_made_again(cleaned, tmp_path, capfd):
    _, record = cleaned
    root = tmp_path / "run"
    config = copy_run(cleaned, tmp_path, keep_ratio=0.45)
    named = damage_everything_before_the_selection(root, *record["threshold"]["losses"].values())
    damaged = rounds.clean(config)
    told = capfd.readouterr().err.splitlines()
    for text in named:
        assert sum(text in line and "made again" in line for line in told) == 1, text
    whole = rounds.clean(config.model_copy(update={"output": cleaned[0].output}))
    assert damaged["threshold"] == whole["threshold"]
    assert masked_rows(damaged) == masked_rows(whole)
    assert masked_rows(record) == masked_rows(record | {"config": {"output": str(root)}})


def test_a_cut_that_is_of_losses_made_again_since_is_found_anew(cleaned, tmp_path, capfd):
    """A run ends before its masks are published, and other hardware then makes its losses again: no cut fits them."""
    _, record = cleaned
    root = tmp_path / "run"
    config = copy_run(cleaned, tmp_path)
    shutil.rmtree(root / "masked")
    file = root / "selections" / record["result"]["selection"] / "threshold.json"
    threshold = json.loads(file.read_text())
    threshold["cut"]["key"] += 1  # the cut of losses that were a last bit higher
    file.write_text(json.dumps(threshold))
    assert rounds.clean(config)["threshold"] == record["threshold"]
    assert "threshold.json is of other losses" in capfd.readouterr().err
    assert kept_set(record | {"config": {"output": str(root)}}) == kept_set(record)


def test_a_file_that_is_damaged_again_ends_the_run(tmp_path):
    asked = []

    def job(run):
        asked.append(run)
        raise Damaged({"losses/m/part-0.parquet": "part-0 is damaged"})

    with pytest.raises(Damaged, match="part-0 is damaged"):
        with_repairs(SimpleNamespace(store=Store(str(tmp_path))), job)
    assert len(asked) == 2


def test_a_damaged_selection_is_made_again_and_a_damaged_snapshot_refused(cleaned, tmp_path, capfd):
    _, record = cleaned
    root = tmp_path / "run"
    config = copy_run(cleaned, tmp_path)
    threshold = root / "selections" / record["result"]["selection"] / "threshold.json"
    threshold.write_text(threshold.read_text()[:-9])
    assert rounds.clean(config)["threshold"] == record["threshold"]
    assert "threshold.json is damaged (not valid JSON): it is made again" in capfd.readouterr().err
    snapshot = root / "masked" / record["result"]["snapshot"]
    part = next(snapshot.glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:-50])
    refusal = f"{part.name} is damaged .* was published, so no run changes it: delete {snapshot}"
    with pytest.raises(UserError, match=refusal):
        rounds.clean(config)
    shutil.rmtree(snapshot)
    again = rounds.clean(config)
    assert again["threshold"] == record["threshold"]
    assert masked_rows(again) == masked_rows(record)
