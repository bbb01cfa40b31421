"""The whole job on a real Ray: `clean` against the oracle and the reference scripts' output, and its resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from conftest import chat, write_rows
from test_models import adapter
from transformers import AutoModelForCausalLM

from tokenclean_ray import rounds, score_actors
from tokenclean_ray.config import Score, Select
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store

pytestmark = pytest.mark.usefixtures("ray_session")

WORDS = [f"{color} {animal}" for color in ("quick", "lazy", "brown") for animal in ("fox", "dog", "the", "7", "8 9")]


def some_rows(count, seed=0):
    generator = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(generator.choice(WORDS, generator.integers(low, high)))

    return [chat(words(2, 12), words(1, 25)) | {"id": n, "source": f"s{n % 3}"} for n in range(count)]


def config_for(tmp_path, model_pair, rows=None, **sections):
    if rows is not None:
        write_rows(tmp_path / "data.jsonl", rows)
    values = {
        "output": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "data.jsonl"), "part_bytes": 4096},
        "model": {"base": model_pair[0], "reference": model_pair[1]},
        "select": {"scorer": "excess_loss"},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys if isinstance(keys, dict) else keys
    return build_config(values)


def read(record, folder):
    """All rows of a stage with their part, in no particular order."""
    root = Store(record["config"]["output"])
    return [
        row | {"part": part} for part in root.part_names(folder) for row in root.read_part(folder, part).to_pylist()
    ]


def masked_rows(record):
    return {(r["part"], r["row"]): r for r in read(record, f"masked/{record['result']['snapshot']}")}


def kept_set(record):
    kept = set()
    for (part, row), r in masked_rows(record).items():
        for t, (token, label) in enumerate(zip(r["input_ids"], r["labels"], strict=True)):
            if label != -100:
                assert label == token
                kept.add((part, row, t))
    return kept


def oracle_scores(record, base_path, reference):
    """Scores of all response tokens by full logits of single rows."""
    base = AutoModelForCausalLM.from_pretrained(base_path).eval()
    reference = AutoModelForCausalLM.from_pretrained(reference).eval() if isinstance(reference, str) else reference
    scores = {}
    for r in read(record, "encoded"):
        ids = torch.tensor([r["input_ids"]])
        with torch.no_grad():
            losses = [-m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (base, reference)]
        for t, in_response in enumerate(r["response_mask"]):
            if in_response:
                token = r["input_ids"][t]
                scores[r["part"], r["row"], t] = float(losses[0][t - 1, token] - losses[1][t - 1, token])
    return scores


def agrees(kept, scores, ratio, scope="global", slack=1e-4):
    """The kept tokens are the oracle's, but for tokens within `slack` of a cut."""
    expected = oracle.kept_tokens(scores, ratio, scope)
    lowest = {}
    for identity in expected:
        group = identity[:2] if scope == "sample" else ()
        lowest[group] = min(lowest.get(group, np.inf), scores[identity])
    for identity in kept ^ expected:
        cut = lowest.get(identity[:2] if scope == "sample" else ())
        assert cut is not None
        assert abs(scores[identity] - cut) <= slack
    return len(kept) == len(expected)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory, model_pair):
    """One undisturbed run with an actor, and a config by which the driver scores."""
    config = config_for(tmp_path_factory.mktemp("cleaned"), model_pair, some_rows(120))
    return config, rounds.clean(config.model_copy(update={"score": Score(num_actors=1)}))


def test_clean_equals_the_oracle(cleaned, model_pair):
    _, record = cleaned
    scores = oracle_scores(record, *model_pair)
    counts = record["counts"]
    assert len(scores) == counts["response_tokens"] == record["threshold"]["tokens"]
    assert agrees(kept_set(record), scores, 0.6)
    assert record["threshold"]["k"] == int(0.6 * len(scores) + 1e-9)
    assert counts["rows"] == 120 == counts["masked"] + counts["nothing_kept"] + counts["rejected"]
    assert {s: v["tokens"] for s, v in record["threshold"]["sources"].items()}.keys() == {"s0", "s1", "s2"}
    near = sum(abs(s - record["threshold"]["score"]) <= 0.001 for s in scores.values())
    assert abs(record["threshold"]["near"] - near) <= 2


def test_rows_carry_their_identity(cleaned):
    config, record = cleaned
    given = {r["id"]: r for r in map(json.loads, Path(config.data.path[0]).read_text(encoding="utf-8").splitlines())}
    rows = masked_rows(record)
    assert len({part for part, _ in rows}) > 2
    assert len({r["id"] for r in rows.values()}) == len(rows)
    for r in rows.values():
        assert r["source"] == given[r["id"]]["source"]


def test_nothing_outside_a_response_is_kept(cleaned):
    _, record = cleaned
    response = {(r["part"], r["row"]): r["response_mask"] for r in read(record, "encoded")}
    assert all(response[part, row][t] for part, row, t in kept_set(record))


def files_of(store, folder):
    return {part: pq.read_table(f"{store}/{folder}/{part}.parquet") for part in Store(store).part_names(folder)}


def test_the_same_bits_from_two_actors_other_parts_lost_and_a_second_attempt(cleaned, tmp_path):
    config, record = cleaned
    store = config.output
    folders = [*record["threshold"]["losses"].values(), f"masked/{record['result']['snapshot']}"]
    again = config.model_copy(update={"output": str(tmp_path / "again"), "score": Score(num_actors=2)})
    # half of the work is there already: every other loss of one model, and no selection
    for folder in ("encoded", folders[0]):
        shutil.copytree(f"{store}/{folder}", f"{again.output}/{folder}")
    for part in sorted(Store(store).part_names("encoded"))[::2]:
        (tmp_path / "again" / folders[0] / f"{part}.parquet").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*.parquet")}
    second = rounds.clean(again)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert second["threshold"]["cut"] == record["threshold"]["cut"]
    assert_same_files(store, again.output, folders)


def assert_same_files(store, again, folders):
    for folder in folders:
        one, other = files_of(store, folder), files_of(again, folder)
        assert one.keys() == other.keys()
        assert all(one[part].equals(other[part]) for part in one)


def test_the_driver_scores_what_takes_seconds_to_the_same_bits(cleaned, tmp_path, monkeypatch):
    config, record = cleaned
    monkeypatch.setattr(score_actors, "ActorPoolStrategy", None)  # no actors
    torch.set_num_threads(2)  # the driver's own, with which a loss would have other last bits
    here = config.model_copy(update={"output": str(tmp_path / "here")})
    try:
        assert rounds.clean(here)["threshold"] == record["threshold"]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert_same_files(config.output, here.output, ["encoded", *record["threshold"]["losses"].values()])


def test_resume_does_only_what_is_missing(cleaned, capfd):
    config, record = cleaned
    stamps = {p: p.stat().st_mtime_ns for p in map_files(config.output)}
    same = rounds.clean(config)
    assert same["result"] == record["result"]
    assert {p: p.stat().st_mtime_ns for p in stamps if p.suffix == ".parquet"} == {
        p: t for p, t in stamps.items() if p.suffix == ".parquet"
    }
    less = rounds.clean(config.model_copy(update={"select": config.select.model_copy(update={"keep_ratio": 0.3})}))
    assert less["result"]["snapshot"] == "v0002"
    new = [p for p in map_files(config.output) if p.suffix == ".parquet" and p not in stamps]
    assert new
    assert {p.parent.name for p in new} == {"v0002"}
    assert "score      9/9 parts were there" in capfd.readouterr().err
    assert kept_set(less) < kept_set(record)
    back = rounds.clean(config)
    assert back["result"] == record["result"]
    assert Store(config.output).read_json("masked/latest.json")["snapshot"] == "v0001"


def map_files(folder):
    return [p for p in Path(folder).rglob("*") if p.is_file()]


def test_per_sample_scope(cleaned, model_pair):
    config, _ = cleaned
    record = rounds.clean(config.model_copy(update={"select": config.select.model_copy(update={"scope": "sample"})}))
    assert agrees(kept_set(record), oracle_scores(record, *model_pair), 0.6, "sample")


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        (
            {"scorer": "gated_excess_loss", "gate": 0.5, "gate_on": "surprise", "strict": True, "keep_ratio": 0.9},
            {"reference": "entropy"},
        ),
        ({"scorer": "entropy", "scope": "sample"}, {"base": "entropy"}),
        ({"scorer": "probability", "above": 0.002, "keep_ratio": 1}, {}),
        (
            {"scorer": "gated_excess_loss", "gate": 40, "gate_on": "rank", "strict": True, "keep_ratio": 1},
            {"reference": "rank"},
        ),
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_scorers_from_store_to_store(cleaned, settings, beside):
    config, first = cleaned
    record = rounds.clean(config.model_copy(update={"select": Select(**settings)}))
    folders = record["threshold"]["losses"]
    plain = first["threshold"]["losses"]
    assert folders == {role: "-".join([plain[role], *([beside[role]] if role in beside else [])]) for role in folders}
    columns = {role: {(r["part"], r["row"]): r for r in read(record, folder)} for role, folder in folders.items()}
    scores = {}
    for r in read(record, "encoded"):
        for t in np.flatnonzero(r["response_mask"]):
            token = {role: rows[r["part"], r["row"]]["loss"][t] for role, rows in columns.items()}
            token |= {f"{role}_{n}": columns[role][r["part"], r["row"]][n][t] for role, n in beside.items()}
            scores[r["part"], r["row"], int(t)] = oracle.score(settings, {"base": 0.0, "reference": 0.0} | token)
    kept = kept_set(record)
    assert agrees(kept, scores, settings.get("keep_ratio", 0.6), settings.get("scope", "global"))
    possible = sum(score > -np.inf for score in scores.values())
    assert possible > 0
    if settings["scorer"] != "entropy":
        assert len(kept) == record["threshold"]["k"] == possible < len(scores)
    assert first["result"] == rounds.clean(config)["result"]


def test_the_selection_does_not_depend_on_parts_even_where_all_scores_tie(tmp_path, model_pair):
    """Reference = base: every score is 0, and the model is scored once."""
    config = config_for(tmp_path, (model_pair[0], model_pair[0]), some_rows(60))
    record = rounds.clean(config)
    tokens = {
        (r["part"], r["row"], t): 0.0 for r in read(record, "encoded") for t, m in enumerate(r["response_mask"]) if m
    }
    assert record["threshold"]["ties"] == len(tokens)
    assert kept_set(record) == oracle.kept_tokens(tokens, 0.6)
    assert len(list((tmp_path / "run" / "losses").iterdir())) == 1


def test_a_lora_reference_is_scored_over_one_base(tmp_path, model_pair):
    from peft import PeftModel

    path = adapter(tmp_path / "lora", model_pair[0])
    config = config_for(tmp_path, (model_pair[0], path), some_rows(40), score={"num_actors": 1})
    record = rounds.clean(config)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_pair[0]), path).eval()
    scores = oracle_scores(record, model_pair[0], merged)
    assert np.std(list(scores.values())) > 0.05
    assert agrees(kept_set(record), scores, 0.6)


def test_another_model_is_scored_under_its_own_name(tmp_path, model_pair):
    config = config_for(tmp_path, model_pair, some_rows(20), score={"colocate": False})
    first = rounds.clean(config)
    swapped = config_for(tmp_path, model_pair[::-1], score={"colocate": False})
    second = rounds.clean(swapped)  # both models' losses are there already
    assert set(first["threshold"]["losses"].values()) == set(second["threshold"]["losses"].values())
    assert first["threshold"]["losses"] != second["threshold"]["losses"]
    assert second["threshold"]["score"] != first["threshold"]["score"]


def test_rows_that_are_cut_are_told_of(tmp_path, model_pair, capfd):
    long = chat("the quick brown fox", "the lazy dog " * 100)
    rounds.clean(config_for(tmp_path, model_pair, [*some_rows(17), long, long, long], data={"max_length": 100}))
    assert "3 of 20 rows reach data.max_length = 100, where longer ones are cut" in capfd.readouterr().err


def test_rejected_rows_are_kept_with_line_and_reason(tmp_path, model_pair):
    rows = some_rows(60)
    rows[7] = {"messages": []}
    rows[50]["messages"][1]["content"] = "x</s>y"
    config = config_for(tmp_path, model_pair, rows, data={"max_rejected": 0.1})
    (tmp_path / "data.jsonl").open("a").write("not json\n")
    record = rounds.clean(config)
    rejected = {r["line"]: r["reason"] for r in read(record, "rejected")}
    assert rejected == {
        8: "messages is empty",
        51: "special-token or template text in the content",
        61: "not valid JSON",
    }
    counts = record["counts"]
    assert counts["rows"] == 61 == counts["masked"] + counts["nothing_kept"] + 3
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_rejected": 0.04})})
    with pytest.raises(UserError, match=r"3 of 61 rows cannot be used, .*messages is empty: 1.* or raise the limit$"):
        rounds.clean(strict)
    write_rows(tmp_path / "data.jsonl", [{"messages": []}] * 3)
    with pytest.raises(UserError, match=r"^none of 3 rows can be used \(messages is empty: 3\); see .*data\.columns$"):
        rounds.clean(config)


def test_nan_scores_name_the_rows(tmp_path, model_pair):
    broken = AutoModelForCausalLM.from_pretrained(model_pair[1])
    with torch.no_grad():
        broken.get_output_embeddings().weight[5:] = float("nan")
    shutil.copytree(model_pair[1], tmp_path / "nan")
    broken.save_pretrained(tmp_path / "nan")
    config = config_for(tmp_path, (model_pair[0], str(tmp_path / "nan")), some_rows(20), score={"num_actors": 1})
    with pytest.raises(UserError, match="NaN"):
        rounds.clean(config)


def test_an_empty_dataset_is_an_error(tmp_path, model_pair):
    with pytest.raises(UserError, match="no rows"):
        rounds.clean(config_for(tmp_path, model_pair, []))


def test_conformance_with_the_reference_scripts(fixtures, tmp_path):
    """Losses within 1e-4 nats, as far as float32 determines them; kept tokens identical but for those as near to the
    cut; both scopes, both ratios."""
    expected = pq.read_table(fixtures / "conformance" / "gsm8k.parquet").to_pylist()
    models = [str(fixtures / "models" / name) for name in ("weak-280k", "strong-260k")]
    data = {"path": str(fixtures / "conformance" / "gsm8k.jsonl"), "template": "tulu", "part_bytes": 1 << 20}
    slack = 0.0
    for scope in ("global", "sample"):
        for ratio in (0.6, 0.3):
            select = {"scope": scope, "keep_ratio": ratio, "scorer": "excess_loss"}
            record = rounds.clean(config_for(tmp_path, models, data=data, select=select))
            rows = sorted(read(record, "encoded"), key=lambda r: r["row"])
            assert [r["input_ids"] for r in rows] == [r["input_ids"] for r in expected]
            assert [r["response_mask"] for r in rows] == [r["response_mask"] for r in expected]
            if not slack:  # the losses are the same for all selections
                folders = record["threshold"]["losses"].values()
                for folder, column, model in zip(folders, ("base_loss", "ref_loss"), models, strict=True):
                    found = [r["loss"] for r in sorted(read(record, folder), key=lambda r: r["row"])]
                    slack += oracle.agree_but_for_rounding(found, expected, column, model)
            part = rows[0]["part"]
            scores, reference_kept = {}, set()
            for n, e in enumerate(expected):
                for t in np.flatnonzero(e["response_mask"]):
                    scores[part, n, int(t)] = e["base_loss"][t] - e["ref_loss"][t]
                    if e[f"keep_{scope}_{ratio}"][t]:
                        reference_kept.add((part, n, int(t)))
            kept = kept_set(record)
            assert agrees(kept, scores, ratio, scope, max(1e-4, slack))
            assert len(kept ^ reference_kept) < 10


def test_a_model_is_saved_with_the_template_that_wrote_its_rows(tmp_path, model_pair, monkeypatch):
    """Whatever the config of the training says, which may be another file than that of the cleaning."""
    rounds.clean(config_for(tmp_path, model_pair, some_rows(20), data={"template": "tulu"}))
    jobs = []
    monkeypatch.setattr(rounds, "fine_tune", lambda job: jobs.append(job) or {})
    for template in ("chat", "tulu"):
        values = {"output": str(tmp_path / "out"), "data": {"template": template}, "model": {"base": model_pair[0]}}
        rounds.train(build_config(values | {"train": {"data": str(tmp_path / "run")}}, "train"))
    assert [job.config.data.template for job in jobs] == ["tulu", "tulu"]
    assert jobs[0].name == jobs[1].name
