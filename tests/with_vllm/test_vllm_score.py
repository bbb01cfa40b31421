"""The vLLM backend on a real engine: `make test-vllm` makes the environment that has one and runs this folder."""

import contextlib
import json
import shutil
import signal
import sys
import threading

import numpy as np
import oracle
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_llama, make_tokenizer, save, wait_for
from peft import PeftModel
from test_models import adapter
from test_rounds import agrees, config_for, files_of, kept_set, oracle_scores, read, some_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenclean_ray import rounds, schema, vllm_check, workers
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Store
from tokenclean_ray.models import describe
from tokenclean_ray.score import PartScorer
from tokenclean_ray.vllm_score import VllmPartScorer

VLLM = {"backend": "vllm", "num_actors": 1}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's CPU kernels have no smaller heads
    "max_position_embeddings": 1024,
}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    # attention softcapping off: vLLM applies it, as transformers' eager attention does, but its SDPA does not
    "gemma2": (
        "gemma2",
        {"sliding_window": 64, "final_logit_softcapping": 5.0, "attn_logit_softcapping": None}
        | {"query_pre_attn_scalar": 32},
    ),
    "gpt2": ("gpt2", {"hidden_size": 128}),
}


def tiny(name):
    kind, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**TINY, **own})).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # sharp predictions: an off-by-one would show
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def widen_heads(source, folder, head=32):
    """The same function with larger heads: zeros fill them, at places where the rotary frequencies stay the same."""
    model = LlamaForCausalLM.from_pretrained(source)
    old = model.config.head_dim
    step = head // old
    place = torch.cat([torch.arange(old // 2) * step, head // 2 + torch.arange(old // 2) * step])
    state = model.state_dict()
    for name, weight in state.items():
        layer = name.split(".")[-2]
        if layer in ("q_proj", "k_proj", "v_proj"):
            wide = torch.zeros(weight.shape[0] // old, head, weight.shape[1])
            wide[:, place] = weight.view(-1, old, weight.shape[1]) * (step**0.5 if layer == "q_proj" else 1)
            state[name] = wide.reshape(-1, weight.shape[1])
        elif layer == "o_proj":
            wide = torch.zeros(weight.shape[0], weight.shape[1] // old, head)
            wide[:, :, place] = weight.view(weight.shape[0], -1, old)
            state[name] = wide.reshape(weight.shape[0], -1)
    model.config.head_dim = head
    wider = LlamaForCausalLM(model.config)
    wider.load_state_dict(state)
    return save(folder, wider, AutoTokenizer.from_pretrained(source))


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a random base and a random reference that vLLM has kernels for."""
    folder, tokenizer = tmp_path_factory.mktemp("vllm-models"), make_tokenizer()
    return [
        save(folder / name, make_llama(seed, scale=3.0, head_dim=32), tokenizer)
        for seed, name in enumerate(("base", "reference"))
    ]


@pytest.fixture(scope="session")
def conformance(fixtures):
    return pq.read_table(fixtures / "conformance" / "gsm8k.parquet").to_pylist()


def encoded(folder, rows):
    """A store with one part."""
    store = Store(str(folder))
    columns = {
        "row": pa.array(range(len(rows)), pa.int32()),
        "input_ids": pa.array([r["input_ids"] for r in rows], schema.TOKENS),
        "response_mask": pa.array([r["response_mask"] for r in rows]),
    }
    store.write_part("encoded", "part-0", pa.table(columns), {})
    return store


def random_rows(count=12):
    generator = np.random.default_rng(0)
    rows = []
    for length in generator.integers(2, 90, count):
        mask = generator.random(length) < 0.6
        mask[0], mask[-1] = False, True
        rows.append({"input_ids": generator.integers(3, 400, length).tolist(), "response_mask": mask.tolist()})
    rows[1]["response_mask"] = [False] * len(rows[1]["input_ids"])  # nothing to score
    return rows


def engine(store, models, **vllm):
    specs = [(spec, f"losses/{n}") for n, spec in enumerate(models)]
    score = vllm_check.fit(models, Score(backend="vllm", vllm=vllm), 1000)
    return VllmPartScorer(store, specs, "float32", score, gpu=False)


def score_with(scorer, store):
    assert scorer.score("part-0", ["losses/0"])["full_logits"] == []
    return store.read_part("losses/0", "part-0")["loss"].to_pylist()


def transformers_losses(store, spec):
    PartScorer(store, [(spec, "losses/t")], "float32", Score(), gpu=False).score("part-0", ["losses/t"])
    return store.read_part("losses/t", "part-0")["loss"].to_pylist()


# -- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_equal_the_other_backends_on_the_conformance_rows(name, tmp_path, conformance):
    store = encoded(tmp_path / "store", conformance)
    spec = describe(save(tmp_path / name, tiny(name)))
    expected = transformers_losses(store, spec)
    scorer = engine(store, [spec])
    found = score_with(scorer, store)
    scorer.close()
    for row, mine, theirs in zip(conformance, found, expected, strict=True):
        assert len(mine) == len(row["input_ids"])
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)
        assert not np.any(np.array(mine)[~np.array(row["response_mask"])])


def test_a_model_spread_over_two_workers(tmp_path):
    """As over two GPUs: each holds half of every matrix. vLLM's CPU workers cannot share the layers instead."""
    store = encoded(tmp_path / "store", random_rows(40))
    spec = describe(save(tmp_path / "model", tiny("llama")))
    expected = transformers_losses(store, spec)
    scorer = engine(store, [spec], tensor_parallel_size=2)
    found = score_with(scorer, store)
    scorer.close()
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "column"), [("weak-280k", "base_loss"), ("strong-260k", "ref_loss")])
def test_the_given_models(name, column, tmp_path, fixtures, conformance):
    """Their heads of 8 have no kernel in vLLM, so they are scored with heads of 32 that compute the same."""
    store = encoded(tmp_path / "store", conformance)
    scorer = engine(store, [describe(widen_heads(fixtures / "models" / name, tmp_path / name))])
    found = score_with(scorer, store)
    scorer.close()
    oracle.agree_but_for_rounding(found, conformance, column, fixtures / "models" / name)


def test_the_same_bits_again_and_rows_without_a_response(tmp_path, pair):
    rows = random_rows()
    store = encoded(tmp_path, rows)
    scorer = engine(store, [describe(pair[0])])
    first = score_with(scorer, store)
    assert score_with(scorer, store) == first
    assert first[1] == [0.0] * len(rows[1]["input_ids"])

    # a row whose scores stay away is sent again, and only that row
    sent, generate = [], scorer._engine.generate

    def forgetful(prompts, *arguments, **named):
        outputs = generate(prompts, *arguments, **named)
        sent.append(len(prompts))
        if len(sent) == 1:
            outputs[3].prompt_logprobs = None
            outputs[5].prompt_logprobs.logprobs.pop()
        return outputs

    scorer._engine.generate = forgetful
    again = score_with(scorer, store)
    assert sent == [11, 2]
    for mine, theirs in zip(again, first, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    scorer._engine.generate = lambda *a, **n: [setattr(o, "prompt_logprobs", None) or o for o in generate(*a, **n)]
    with pytest.raises(UserError, match="no scores for 11 rows of part-0 in 3 attempts"):
        score_with(scorer, store)
    scorer.close()


def test_bfloat16_bodies_have_float32_heads(tmp_path, pair):
    rows = random_rows()
    store = encoded(tmp_path, rows)
    spec = describe(pair[0])
    score = vllm_check.fit([spec], Score(backend="vllm"), 200)
    scorer = VllmPartScorer(store, [(spec, "losses/0")], "bfloat16", score, gpu=False)
    found = np.concatenate(score_with(scorer, store))
    scorer.close()
    exact = np.concatenate(transformers_losses(store, spec))
    assert 0 < np.abs(found - exact).max() < 0.3
    # logits in bfloat16 would be multiples of a power of two, and so would many a difference
    assert len(np.unique(found[found > 0])) == (found > 0).sum()


# -- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=["head", "embedding", "saved", "dora"],
)
def test_adapters_of_more_than_the_layers_are_refused(tmp_path, pair, settings):
    base = describe(pair[0])
    reference = describe(adapter(tmp_path / "lora", pair[0], **settings), base)
    with pytest.raises(UserError, match=r"is not a LoRA delta .* merge the adapter, or set score.backend"):
        vllm_check.fit([base, reference], Score(backend="vllm"), 100)


def test_a_lora_reference_is_scored_over_one_engine(tmp_path, pair, ray_session):
    path = adapter(tmp_path / "lora", pair[0])
    record = rounds.clean(config_for(tmp_path, (pair[0], path), some_rows(40), score=VLLM))
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), path).eval()
    scores = oracle_scores(record, pair[0], merged)
    assert np.std(list(scores.values())) > 0.05
    assert agrees(kept_set(record), scores, 0.6)


# -- the job -----------------------------------------------------------------------------------------------------


def engine_processes():
    """Processes of engines: by the title that most give themselves, or as multiprocessing starts them."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        spawned = command[:1] == [sys.executable] and "spawn_main" in " ".join(command)
        if command and (command[0].startswith("VLLM::") or spawned):
            found.append(process)
    return found


def engine_workers():
    """Those that actors of Ray have started."""
    found = []
    for process in engine_processes():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent and " ".join(parent.cmdline()).startswith("ray::"):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory, pair):
    workers.connect()
    config = config_for(tmp_path_factory.mktemp("cleaned"), pair, some_rows(120), score=VLLM)
    return config, rounds.clean(config)


def test_the_whole_job_equals_the_oracle(cleaned, pair):
    config, record = cleaned
    scores = oracle_scores(record, *pair)
    assert agrees(kept_set(record), scores, 0.6)
    assert all(folder.endswith("-float32-vllm") for folder in record["threshold"]["losses"].values())
    other = rounds.clean(config.model_copy(update={"score": Score(num_actors=1)}))  # the backends' losses never mix
    assert not set(other["threshold"]["losses"].values()) & set(record["threshold"]["losses"].values())
    assert len(read(other, next(iter(other["threshold"]["losses"].values())))) == 120


def test_an_engine_killed_in_the_middle(cleaned, pair, tmp_path):
    """Its actor goes down with it, Ray starts another, and the result is the same; nothing is left running."""
    config, record = cleaned
    score = {**VLLM, "vllm": {"distributed_executor_backend": "mp"}}  # as with tensor parallelism: workers are children
    again = config.model_copy(update={"output": str(tmp_path / "run"), "score": Score(**score)})
    killed = []

    def kill():
        workers = []  # known before the first part is there: all of them may take less time than to look for processes
        while not killed and not stop.wait(0.02):
            if not any(worker.is_running() for worker in workers):
                workers = engine_workers()
            if list((tmp_path / "run" / "losses").glob("*/part-*.parquet")):
                for worker in workers:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.send_signal(signal.SIGKILL)
                        killed.append(worker.pid)

    stop = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        second = rounds.clean(again)
    finally:
        stop.set()
        killer.join()
    assert killed
    for folder in record["threshold"]["losses"].values():
        one, other = files_of(config.output, folder), files_of(again.output, folder)
        assert one.keys() == other.keys()
        for part, table in one.items():
            for mine, theirs in zip(table["loss"].to_pylist(), other[part]["loss"].to_pylist(), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert second["counts"] == record["counts"]
    wait_for(lambda: not engine_processes())


# -- what can be mended ------------------------------------------------------------------------------------------


def test_what_an_engine_refuses_is_one_line(tmp_path, pair, monkeypatch):
    store = encoded(tmp_path / "store", random_rows())
    spec = describe(pair[0])
    with pytest.raises(UserError, match=r"score\.vllm\.gpu_memory_utilisation is not .*did you mean gpu_memory_utiliz"):
        engine(store, [spec], gpu_memory_utilisation=0.5)
    with pytest.raises(UserError, match=r"out of memory .*lower score.batch_tokens"):
        engine(store, [spec], kv_cache_memory_bytes=1000)
    small = describe(save(tmp_path / "small", make_llama(0)))  # heads of 8
    with pytest.raises(
        UserError, match=r"vLLM failed on two first rows: .*head_dim=8.*set score.backend: transformers"
    ):
        engine(store, [small])
    shutil.copytree(pair[0], tmp_path / "unknown")
    settings = json.loads((tmp_path / "unknown" / "config.json").read_text())
    settings["architectures"] = ["FooForCausalLM"]
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"vLLM cannot load it: .*FooForCausalLM"):
        engine(store, [describe(str(tmp_path / "unknown"))])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"install the extra tokenclean-ray\[vllm\]"):
        engine(store, [spec])


def test_a_job_tells_it_in_one_line(tmp_path, pair, ray_session):
    config = config_for(tmp_path, pair, some_rows(5), score={**VLLM, "vllm": {"max_num_seq": 1}})
    with pytest.raises(UserError, match=r"score\.vllm\.max_num_seq is not .*did you mean max_num_seqs"):
        rounds.clean(config)
    config = config_for(tmp_path, pair, score={**VLLM, "vllm": {"max_model_len": 2048}})
    with pytest.raises(UserError, match=r"set data.max_length to 2047 or less"):
        rounds.clean(config)


def test_a_row_longer_than_max_model_len_is_rejected_with_its_reason(tmp_path, pair, ray_session):
    rows = some_rows(20)
    rows[4]["messages"][1]["content"] = "quick fox " * 200
    data = {"max_length": 199, "on_overflow": "reject", "max_rejected": 0.1}
    score = {**VLLM, "vllm": {"max_model_len": 200}}
    record = rounds.clean(config_for(tmp_path, pair, rows, data=data, score=score))
    assert record["counts"]["rejected"] == 1
    assert "long" in read(record, "rejected")[0]["reason"]
