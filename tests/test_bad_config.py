"""Every field of the config out of its range, and fields that contradict: one line that says what to write instead."""

from typing import Annotated, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from test_config import config_with

from tokenclean_ray.config import Config
from tokenclean_ray.config_file import build_config
from tokenclean_ray.errors import UserError


def leaves(model: type[BaseModel], path: str = ""):
    """(key, annotation, metadata) of every field, sections entered."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}", field.annotation, field.metadata


def limits(metadata):
    """(attribute, limit) of a field's constraints; `Field` in an alias keeps its own list."""
    for constraint in metadata:
        yield from limits(getattr(constraint, "metadata", ()))
        for name in ("ge", "gt", "le", "lt"):
            if getattr(constraint, name, None) is not None:
                yield name, getattr(constraint, name)


def bad_values(annotation, metadata) -> list:
    """Values that a field must refuse: just out of range, of another type, of another set."""
    step = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
    bad = [limit + step[name] for name, limit in limits(metadata)]
    if annotation is float:
        bad += [float("nan"), float("inf"), float("-inf"), "much"]
    elif annotation is int:
        bad += [1.5, "many", [1]]
    elif annotation is bool:
        bad += ["perhaps", 2]
    elif annotation is str:
        bad += [7, "", []]
    elif get_origin(annotation) is Literal:
        bad += ["no such choice", "", 7]
    elif get_origin(annotation) in (dict, tuple):
        bad += [3, [[]]]
    else:  # a union: what each of its kinds refuses, of a type that no other kind takes
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        bad += [{"a": 1}, [[]]]
        bad += ["no such choice"] * all(get_origin(kind) in (Literal, tuple) or kind in (int, bool) for kind in kinds)
        bad += [0, -1, [0, 1], [2, 1]] * any(get_origin(kind) is Annotated for kind in kinds)
    return bad


OUT_OF_RANGE = [(key, value) for key, *field in leaves(Config) for value in bad_values(*field)]


def test_every_field_has_values_that_it_refuses():
    assert {key for key, _ in OUT_OF_RANGE} == {key for key, *_ in leaves(Config)}
    ranged = [key for key, _, metadata in leaves(Config) if list(limits(metadata))]
    assert len(ranged) > 15


# by hand: where a range ends, which OUT_OF_RANGE takes from the config itself, and values of other kinds
BY_HAND = [
    *(("data.max_length", 1), ("data.max_rejected", -0.1), ("data.max_rejected", 1.1), ("data.part_bytes", 1023)),
    *(("score.batch_tokens", 0), ("score.num_actors", 0), ("score.gpus_per_actor", 0), ("score.cpus_per_actor", 0)),
    *(("select.gate", 0), ("select.above", 1), ("select.below", 0), ("select.keep_ratio", 0)),
    *(("output", None), ("data", 3), ("data.path", []), ("data.path", 3), ("data.columns", ["messages"])),
    *(("data.columns.messages", 3), ("score.num_actors", "many"), ("score.num_actors", [1])),
    *(("score.num_actors", [0, 2]), ("select.keep_ratio", 1.01), ("select.keep_ratio", float("nan"))),
    *(("select.keep_ratio", "atuo"), ("select.calibrate.share", 0)),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE + BY_HAND, ids=lambda v: str(v)[:40])
def test_a_field_out_of_range(key, value):
    values = inner = config_with()
    *sections, last = key.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        build_config(values)
    message = str(caught.value)
    if message.startswith(f"unknown key {key}."):
        return  # the field is a section that may be left out
    assert {problem.partition(": ")[0] for problem in message.split("; ")} == {key}
    assert f"(it is {value!r})" in message or isinstance(value, list)  # of a list, the item that is wrong


# kind → (change of the smallest config, what the error says)
CONTRADICTIONS = {
    "a range of actors upside down": (
        {"score": {"num_actors": [3, 2]}},
        "score.num_actors: [min, max] wants min <= max",
    ),
    "a range of workers upside down": (
        {"train": {"num_workers": [3, 2]}},
        "train.num_workers: [min, max] wants min <= max",
    ),
    "a gate without its scorer": (
        {"select": {"gate": 3.0, "scorer": "excess_loss"}},
        "gate has an effect only under scorer: gated_excess_loss, not excess_loss",
    ),
    "a gate where it decides nothing": (
        {"select": {"scorer": "plausibility", "gate": 3}},
        "gate has an effect only under scorer: gated_excess_loss",
    ),
    "strict without its scorer": (
        {"select": {"scorer": "probability", "strict": True}},
        "strict has an effect only under scorer: gated_excess_loss",
    ),
    "a limit without its scorer": (
        {"select": {"scorer": "base_loss", "above": 0.1}},
        "above has an effect only under scorer: probability, not base_loss",
    ),
    "a place of the gate without its scorers": (
        {"select": {"scorer": "entropy", "gate_on": "rank"}},
        "gate_on has an effect only under scorer: gated_excess_loss or plausibility",
    ),
    "a gate to be read from no rows": (
        {"select": {"gate": "auto"}},
        "read from clean rows: set data.held_out or data.warmup",
    ),
    "a ratio to be found for each row": (
        {"select": {"keep_ratio": "auto", "scope": "sample"}},
        "keep_ratio: auto wants scope: global",
    ),
    "a ratio to be found at random": (
        {"select": {"keep_ratio": "auto", "scorer": "random"}},
        "a scorer that reads losses",
    ),
    "noise without a ratio to be found": (
        {"select": {"max_noise": 0.1}},
        "max_noise has an effect only under keep_ratio: auto",
    ),
    "a seed without its scorer": ({"select": {"seed": 1}}, "seed has an effect only under scorer: random"),
    "a plan twice": ({"evolve": {"plans": ["fixed", "full", "fixed"]}}, "evolve.plans: fixed is there twice"),
    "limits that leave nothing": (
        {"select": {"scorer": "probability", "above": 0.5, "below": 0.4}},
        "above must be less than below",
    ),
    "limits that meet": (
        {"select": {"scorer": "probability", "above": 0.5, "below": 0.5}},
        "above must be less than below",
    ),
    "all, but not all": ({"select": {"scorer": "full"}}, "set keep_ratio: 1"),
    **{
        f"{on} from vLLM": (
            {"select": select, "score": {"backend": "vllm"}},
            "vLLM gives losses alone: set score.backend: transformers",
        )
        for on, select in (
            ("entropies", {"scorer": "entropy"}),
            ("surprise", {"scorer": "gated_excess_loss", "gate_on": "surprise"}),
            ("ranks", {"scorer": "gated_excess_loss", "gate_on": "rank"}),
        )
    },
    "an engine argument that is another key's": (
        {"score": {"vllm": {"dtype": "half"}}},
        "score.vllm: dtype follows from model.dtype",
    ),
    "a column of ours to carry": (
        {"data": {"extra_columns": ["labels"]}},
        "labels is a column that is written in any case",
    ),
    "a column that no format expects": ({"data": {"columns": {"message": "x"}}}, "did you mean messages?"),
    "no data": ({"data": {"path": None}}, "data.path is missing: set it in the config or as data.path=…"),
    "neither reference nor warm-up": ({"model": {"reference": None}}, "model.reference=… or data.warmup=…"),
    "a section that is a list": ({"data": None}, "data"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_fields_that_contradict(kind):
    change, expected = CONTRADICTIONS[kind]
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        build_config(config_with(**change))
    assert expected in str(caught.value)
