"""The config's contract: values, overrides, files. What is refused: test_bad_config; defaults: test_readme."""

from pathlib import Path

import pytest
import yaml
from conftest import run_python
from pydantic import ValidationError

from tokenclean_ray.config_file import build_config, load_config
from tokenclean_ray.errors import UserError

MINIMAL = {"output": "runs/a", "data": {"path": "rows.jsonl"}, "model": {"base": "b", "reference": "r"}}


def config_with(**sections):
    """The smallest config, with changes by section."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    for key, change in sections.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return values


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def message_of(values) -> str:
    with pytest.raises(UserError) as caught:
        build_config(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.format", "sharegpt"),
        ("data.template", "tulu"),
        ("data.on_overflow", "reject"),
        ("data.max_length", 2),
        ("data.max_rejected", 0.0),
        ("data.max_rejected", 1.0),
        ("data.columns", {"messages": "conversations"}),
        ("data.turn_keys", {"content": "text", "reasoning_content": None}),
        ("data.path", ("a.jsonl", "b/*.parquet")),
        ("model.dtype", "bfloat16"),
        ("score.num_actors", 3),
        ("score.num_actors", (1, 4)),
        ("score.colocate", True),
        ("score.colocate", False),
        ("select.scope", "sample"),
        ("select.keep_ratio", 1.0),
    ],
)
def test_accepts(key, value):
    section, name = key.split(".")
    config = build_config(config_with(**{section: {name: value}}))
    accepted = getattr(getattr(config, section), name)
    assert accepted == value
    assert type(accepted) is type(value)


def test_fields_of_select_that_agree():
    for select in (
        {"scorer": "gated_excess_loss", "gate": 3, "gate_on": "surprise", "strict": True},
        {"scorer": "probability", "above": 0.1, "below": 0.95, "keep_ratio": 1},
        {"scorer": "full", "keep_ratio": 1},
    ):
        chosen = build_config(config_with(select=select)).select
        assert {key: getattr(chosen, key) for key in select} == select
        assert type(chosen).model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sead": 1}, "unknown key sead; did you mean seed?"),
        ({"data": {"max_lenght": 5}}, "unknown key data.max_lenght; did you mean max_length?"),
        ({"select": {"keep-ratio": 0.5}}, "unknown key select.keep-ratio; did you mean keep_ratio?"),
        ({"evolve": {"zzz": 1}}, "unknown key evolve.zzz; known here: num_subsets, plans, guard, held_out_share"),
        ({"score": {"batch_token": 1}}, "unknown key score.batch_token; did you mean batch_tokens?"),
    ],
)
def test_unknown_key_names_the_nearest(change, expected):
    assert message_of(config_with(**change)) == expected


def test_a_key_without_its_section_is_given_one():
    assert message_of(config_with(keep_ratio=0.3)) == "unknown key keep_ratio; did you mean select.keep_ratio?"
    assert message_of(config_with(batch_tokens=9)) == (
        "unknown key batch_tokens; did you mean score.batch_tokens or train.batch_tokens?"
    )


def test_a_section_of_comments_alone_has_its_defaults(file):
    with open(file, "a") as more:
        more.write("select:\n  # keep_ratio: 0.3\n")
    assert load_config(file, []).select == build_config(MINIMAL).select
    assert load_config(file, ["select.keep_ratio=0.3"]).select.keep_ratio == 0.3


def test_a_section_that_stands_twice_is_refused(file):
    with open(file, "a") as more:
        more.write("select: {keep_ratio: 0.3}\nselect:\n  gate: 1.0\n")
    with pytest.raises(UserError, match=r"^[^\n]*select is there twice, in lines \d+ and \d+: join them[^\n]*$"):
        load_config(file, [])


def test_one_value_is_a_list_of_one():
    config = build_config(config_with(
        data={"extra_columns": "a"}, model={"trust_remote_code": "b"}, evolve={"plans": "full"},
        train={"lora": {"targets": "q_proj"}},
    ))  # fmt: skip
    assert config.data.extra_columns == ("a",)
    assert config.model.trust_remote_code == ("b",)
    assert config.evolve.plans == ("full",)
    assert config.train.lora.targets == ("q_proj",)


def test_missing_keys_say_how_to_set_them():
    assert message_of({"output": "o", "data": {"path": "x"}, "model": {"base": "b"}}) == (
        "model.reference is missing: set it in the config or as model.reference=… or data.warmup=…"
    )
    with pytest.raises(UserError, match=r"train\.data is missing.*; train\.model is missing"):
        build_config({"output": "o"}, "train")
    assert build_config({"output": "o", "data": {"path": "x"}, "model": {"base": "b"}}, "evolve").evolve.guard
    with pytest.raises(UserError, match=r"^output is missing: set it in the config or as output=…$"):
        build_config({})


@pytest.mark.parametrize("command", ["sweep", "evolve"])
def test_a_cut_is_kept_by_clean_alone(command):
    values = config_with(select={"cut": "runs/a/selections/x"})
    assert build_config(values, "clean").select.cut
    with pytest.raises(UserError, match=f"select.cut is for clean, and {command} looks for cuts"):
        build_config(values, command)


def test_every_problem_is_named_at_once():
    message = message_of(config_with(data={"max_length": 0}, select={"keep_ratio": 2}))
    assert "data.max_length" in message
    assert "select.keep_ratio" in message


def test_overrides_hold_yaml_values(file):
    config = load_config(
        file,
        [
            "output=s3://b/run=1",
            "data.path=[a.jsonl, b.parquet]",
            "data.columns={messages: chat}",
            "score.num_actors=[1, 4]",
            "score.colocate=false",
            "select.keep_ratio=0.3",
            "select.keep_ratio=0.5",
        ],
    )
    assert config.output == "s3://b/run=1"
    assert config.data.path == ("a.jsonl", "b.parquet")
    assert config.data.columns == {"messages": "chat"}
    assert config.score.num_actors == (1, 4)
    assert config.score.colocate is False
    assert config.select.keep_ratio == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("select.keep_ratio", "is not of the form section.key=value"),
        ("=0.5", "is not of the form section.key=value"),
        ("output.name=x", "output is a value, not a section"),
        ("data.path=[a", "is not valid YAML"),
        ("select.keep_ration=0.5", "did you mean keep_ratio?"),
        ("select.keep_ratio=", "select.keep_ratio"),
    ],
)
def test_bad_overrides(file, override, expected):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        load_config(file, [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: [a", "not valid YAML"),
        (b"? [a]\n: b", "not valid YAML"),
        (b"{seed: 1, seed: 2}", "seed is there twice"),
        (b"\xff\xfe", "not valid YAML"),
        (b"", "must hold keys"),
        (b"- a", "must hold"),
    ],
)
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^[^\n]*{expected}[^\n]*$"):
        load_config(str(path), [])


def test_missing_file_names_the_nearest(file):
    with pytest.raises(UserError, match=r"does not exist; did you mean \S+/run\.yaml\?$"):
        load_config(file.replace("run.yaml", "rum.yaml"), [])


def test_frozen():
    config = build_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.select.keep_ratio = 0.1


def test_imports_nothing_heavy():
    code = (
        "import sys, tokenclean_ray.config_file; print({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    assert run_python(code) == "set()\n"


def test_the_paper_s_setup_is_ready_to_copy():
    path = Path(__file__).parent.parent / "jobs" / "configs" / "paper-llama-3.2-3b.yaml"
    config = load_config(str(path), [], "evolve")
    train, lora = config.train, config.train.lora
    assert (lora.r, lora.alpha, lora.dropout, len(lora.targets)) == (64, 16, 0.1, 7)
    assert (train.learning_rate, train.warmup_ratio, train.epochs, train.batch_rows) == (1e-4, 0.03, 1, 48)
    assert (config.data.template, config.data.max_length) == ("tulu", 2048)
    assert (config.select.scorer, config.select.keep_ratio) == ("excess_loss", 0.6)
    assert (config.evolve.num_subsets, config.evolve.plans) == (5, ("self_evolving",))
