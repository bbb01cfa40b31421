"""What is checked before a vLLM engine is started; needs no vLLM."""

import json
import shutil

import pytest
from conftest import make_llama, save
from test_models import adapter
from transformers import GPT2Config, GPT2LMHeadModel

from tokenclean_ray import vllm_check, vllm_score
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.models import describe

SCORE = Score(backend="vllm")


def test_room_for_one_token_after_the_longest_row(model_pair):
    base = describe(model_pair[0])
    assert vllm_check.fit([base, base], SCORE, 300).vllm == {"max_model_len": 301}
    own = Score(backend="vllm", vllm={"max_model_len": 400, "quantization": "fp8"})
    assert vllm_check.fit([base, base], own, 399).vllm == own.vllm
    with pytest.raises(
        UserError, match=r"score\.vllm\.max_model_len allows 400 tokens.*data.max_length to 399 or less"
    ):
        vllm_check.fit([base, base], own, 400)


def test_learned_positions_are_a_limit(tmp_path):
    gpt2 = describe(save(tmp_path / "g", GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64))))
    with pytest.raises(UserError, match=r"model .* allows 64 tokens.*63 or less"):
        vllm_check.fit([gpt2, gpt2], SCORE, 64)


@pytest.mark.parametrize(
    ("rope", "length", "message"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 50, "dynamic RoPE scaling"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64, "set data.max_length below 64"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 63, None),
    ],
)
def test_rope_scaling_that_vllm_applies_to_all_rows_alike(tmp_path, model_pair, rope, length, message):
    folder = shutil.copytree(model_pair[0], tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    extra = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if rope["rope_type"] == "longrope" else {}
    settings["rope_parameters"] = {"rope_theta": 10000.0, **rope, **extra}
    (folder / "config.json").write_text(json.dumps(settings))
    spec = describe(str(folder))
    if message is None:
        vllm_check.fit([spec, spec], SCORE, length)
    else:
        with pytest.raises(UserError, match=message):
            vllm_check.fit([spec, spec], SCORE, length)


def test_models_of_one_run_are_scored_alike(tmp_path, model_pair):
    base, reference = map(describe, model_pair)
    with pytest.raises(UserError, match=r"score\.colocate"):
        vllm_check.fit([base, reference], Score(backend="vllm", colocate=True), 100)
    lora = describe(adapter(tmp_path / "lora", model_pair[0]), base)
    vllm_check.fit([base, lora], Score(backend="vllm", colocate=True), 100)
    folder = shutil.copytree(model_pair[1], tmp_path / "quantised")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"differ in quantisation .*quantised: fp8"):
        vllm_check.fit([base, describe(str(folder))], SCORE, 100)


def test_losses_are_named_after_what_changes_them():
    def suffix(**arguments):
        return vllm_check.folder_suffix(Score(backend="vllm", vllm=arguments))

    assert suffix() == suffix(tensor_parallel_size=2, max_model_len=100) == "-vllm"
    assert vllm_check.folder_suffix(Score(vllm={"quantization": "fp8"})) == ""
    assert len({suffix(), suffix(quantization="fp8"), suffix(quantization="awq")}) == 3


def test_gpus_and_parallelism_must_match(tmp_path):
    spec = describe(save(tmp_path / "m", make_llama(0)))
    four = Score(backend="vllm", gpus_per_actor=4, vllm={"max_model_len": 100})
    assert vllm_score.engine_arguments(spec, None, "bfloat16", four, gpu=True)["tensor_parallel_size"] == 4
    assert vllm_score.engine_arguments(spec, None, "bfloat16", four, gpu=True)["distributed_executor_backend"] == "mp"
    two = four.model_copy(update={"vllm": {"max_model_len": 100, "tensor_parallel_size": 2}})
    with pytest.raises(UserError, match=r"set score\.gpus_per_actor to 2"):
        vllm_score.engine_arguments(spec, None, "bfloat16", two, gpu=True)
