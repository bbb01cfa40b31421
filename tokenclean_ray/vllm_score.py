"""Per-token losses from a vLLM engine: for models that want tensor parallelism, quantisation or long contexts.

Input: encoded parts. Output: the same losses files as `score` writes, to the kernels' rounding. Token ids go in, flat
float32 arrays come out. vLLM is imported where an engine is built, in a scoring actor, and nowhere else.

The engine runs in the actor's own process (its workers are children where one engine spans several GPUs). So it dies
with its actor, its errors arrive as exceptions, and all rows of a part are queued before its first step: the same
part makes the same batches.
"""

import dataclasses
import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tokenclean_ray.batching import budget_on
from tokenclean_ray.config import Score
from tokenclean_ray.errors import UserError, nearest, why
from tokenclean_ray.layout import Store
from tokenclean_ray.models import ADAPTER_CONFIG, ModelSpec, on_this_machine, read_config
from tokenclean_ray.schema import FLOATS, flat_lists, list_column, losses
from tokenclean_ray.vllm_check import check_adapter

ENVIRONMENT = {  # read when vLLM is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the actors of a node all bind to its first cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_CACHE_BYTES = 1 << 30  # without a number vLLM takes most of the machine's memory for keys and values
CPU_BATCH_TOKENS = 4096
GPU_MEMORY = 0.8  # the rest is for logits, which vLLM does not count when it plans its memory
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for
ATTEMPTS = 3
OUT_OF_MEMORY = "out of memory|OutOfMemory|KV cache|cache blocks"
ENGINE_ERRORS = (ValueError, RuntimeError, OSError, ImportError, MemoryError, KeyError, AttributeError, AssertionError)


class VllmPartScorer:
    """Holds one engine and turns encoded/ into losses/<model>/, part by part. Same shape as `score.PartScorer`."""

    def __init__(self, store: Store, models: list[tuple[ModelSpec, str]], dtype: str, score: Score, gpu: bool) -> None:
        """Build the engine.

        Args:
            models: each with the folder of its losses; all over one base, at most one of them with an adapter.
            dtype: of the weights.
            gpu: on the visible GPUs; else on `score.cpus_per_actor` threads.

        Raises:
            UserError: vLLM is missing, or it cannot load or run the model, with its reason.
        """
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        if not gpu:
            os.environ["OMP_NUM_THREADS"] = str(score.cpus_per_actor)  # of the engine's children
            torch.set_num_threads(score.cpus_per_actor)
        try:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(
                f"score.backend is vllm, but vLLM cannot be imported on a node ({_line(error)}): install the extra "
                "tokenclean-ray[vllm] on every node, or set score.backend: transformers"
            ) from error
        models = [(on_this_machine(spec), folder) for spec, folder in models]
        self._store, self._models = store, models
        self._path = models[0][0].path
        adapters = {spec.adapter for spec, _ in models if spec.adapter}
        assert len({spec.path for spec, _ in models}) == 1
        assert len(adapters) <= 1
        arguments = engine_arguments(models[0][0], next(iter(adapters), None), dtype, score, gpu)
        _check_names(arguments)
        try:
            self._engine = LLM(**arguments)
        except ENGINE_ERRORS as error:
            raise UserError(f"model {self._path}: vLLM cannot load it: {_advice(error)}") from error
        self.close = weakref.finalize(self, self._engine.llm_engine.engine_core.shutdown)
        self._lora = {path: LoRARequest("reference", 1, path) for path in adapters}
        # the array of given tokens' scores, where this version and its runner have it; else the flat lists
        self._by_ids = "prompt_logprob_token_ids" in SamplingParams.__struct_fields__ and getattr(
            self._engine.llm_engine.vllm_config, "use_v2_model_runner", False
        )
        self._sampling = SamplingParams
        try:
            self._check_runs()
        except UserError:
            self.close()
            raise

    def _check_runs(self) -> None:
        """Two small rows: some models load and then have no kernel."""
        ids = np.arange(3, 27, dtype=np.int32)
        offsets = np.array([0, 10, len(ids)])
        mask = ~np.isin(np.arange(len(ids)), offsets)
        for spec, _ in self._models:
            if np.isnan(self._losses(ids, mask, offsets, spec.adapter, "two first rows")).any():
                raise UserError(f"model {spec.adapter or spec.path} gives NaN losses: set model.dtype: float32")

    def score(self, part: str, folders: list[str]) -> dict[str, Any]:
        """Score a part under the models of some folders and commit the losses.

        Returns:
            `rows`, and `full_logits` and `lowered`: no folder, there is no other way here.
        """
        encoded = self._store.read_part("encoded", part, ["row", "input_ids", "response_mask"])
        ids, offsets = flat_lists(encoded["input_ids"])
        mask, _ = flat_lists(encoded["response_mask"])
        for spec, folder in self._models:
            if folder not in folders:
                continue
            found = self._losses(ids, mask, offsets, spec.adapter, part)
            table = pa.table([encoded["row"], list_column(found, offsets, FLOATS)], losses())
            self._store.write_part(folder, part, table, {"rows": table.num_rows})
        return {"rows": encoded.num_rows, "full_logits": [], "lowered": {}}

    def _losses(
        self, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray, adapter: str | None, part: str
    ) -> np.ndarray:
        """The loss of every token of flat rows, float32, nats; 0 where the mask is false. See `score_statistics`."""
        found = np.zeros(len(ids), np.float32)
        row_of_target = np.searchsorted(offsets, np.flatnonzero(mask), side="right") - 1
        waiting = np.unique(row_of_target)
        for _ in range(ATTEMPTS):
            if not len(waiting):
                break
            rows = [ids[offsets[row] : offsets[row + 1]] for row in waiting]
            without = []
            for row, logprobs in zip(waiting, self._logprobs(rows, adapter, part), strict=True):
                if logprobs is None:
                    without.append(row)  # preempted and resumed: vLLM then keeps its scores to itself
                else:
                    found[offsets[row] + 1 : offsets[row + 1]] = 0 - logprobs
            waiting = np.array(without, np.int64)
        if len(waiting):
            raise UserError(
                f"vLLM gave no scores for {len(waiting)} rows of {part} in {ATTEMPTS} attempts: "
                "lower score.vllm.max_num_seqs, so that it preempts none"
            )
        found[~mask] = 0
        return found

    def _logprobs(self, rows: list[np.ndarray], adapter: str | None, part: str) -> list[np.ndarray | None]:
        """Per row the log-probabilities of its tokens after the first, float32; None where the engine gave none."""
        from vllm.v1.engine.exceptions import EngineDeadError

        prompts: Any = [{"prompt_token_ids": row.tolist()} for row in rows]
        parameters = [self._parameters(row) for row in rows] if self._by_ids else self._parameters(rows[0])
        lora = self._lora[adapter] if adapter else None
        try:
            outputs = self._engine.generate(prompts, parameters, use_tqdm=False, lora_request=lora)
        except (EngineDeadError, *ENGINE_ERRORS) as error:
            if isinstance(error, EngineDeadError) or self._lost_a_worker():
                os._exit(1)  # Ray starts this actor anew and gives it the part again
            raise UserError(f"model {self._path}: vLLM failed on {part}: {_advice(error)}") from error
        return [given_logprobs(output, row) for output, row in zip(outputs, rows, strict=True)]

    def _lost_a_worker(self) -> bool:
        """Whether a child was killed, as opposed to one that raised: that one is alive, and would raise again."""
        core = getattr(self._engine.llm_engine.engine_core, "engine_core", None)
        return bool(getattr(getattr(core, "model_executor", None), "is_failed", False))

    def _parameters(self, row: np.ndarray) -> Any:
        common: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        if self._by_ids:
            return self._sampling(prompt_logprob_token_ids=row[1:, None].astype(np.int32), **common)
        return self._sampling(prompt_logprobs=0, flat_logprobs=True, **common)


def given_logprobs(output: Any, row: np.ndarray) -> np.ndarray | None:
    """Log-probabilities of a prompt's own tokens.

    Args:
        output: a vLLM `RequestOutput`.
        row: token ids of the prompt, shape (T,).

    Returns:
        (T - 1,) float32, entry t for token t + 1; or None where they are missing or incomplete.
    """
    array = getattr(output, "prompt_token_id_logprobs", None)
    if array is not None:
        logprobs = np.asarray(array, np.float32).reshape(-1)
    elif output.prompt_logprobs is not None:
        # flat lists with one entry per token, the token itself; the first token has none
        flat = output.prompt_logprobs
        logprobs = np.asarray(flat.logprobs, np.float32)
        assert len(logprobs) != len(row) - 1 or np.array_equal(flat.token_ids, row[1:])
    else:
        return None
    return logprobs if len(logprobs) == len(row) - 1 else None


def engine_arguments(spec: ModelSpec, adapter: str | None, dtype: str, score: Score, gpu: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM`: ours, then the user's `score.vllm` on top.

    Raises:
        UserError: GPUs that do not match, an adapter of a rank that vLLM has no room for.
    """
    batch_tokens = budget_on(gpu, score.batch_tokens, CPU_BATCH_TOKENS)
    length = score.vllm["max_model_len"]
    arguments: dict[str, Any] = {
        "model": spec.path,
        "revision": spec.revision,
        "trust_remote_code": spec.trusted,
        "load_format": "safetensors",  # left to itself vLLM takes a pickle where it finds nothing else
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_prefix_caching": False,  # cached tokens would come back without scores
        "enforce_eager": True,  # compiled graphs are for decoding, and cost minutes
        "max_num_batched_tokens": batch_tokens,
        "max_num_seqs": min(256, batch_tokens),
    }
    if gpu:
        arguments |= {"tensor_parallel_size": score.gpus_per_actor, "gpu_memory_utilization": GPU_MEMORY}
    else:
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    if adapter:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(Path(adapter))}
        # left to itself vLLM also wraps the head, which then cannot score prompts of several rows
        arguments["lora_target_modules"] = check_adapter(Path(adapter))
    arguments |= score.vllm
    arguments["hf_overrides"] = _overrides(spec, length) | score.vllm.get("hf_overrides", {})
    processes = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    if gpu and processes != score.gpus_per_actor:
        raise UserError(f"score.vllm wants {processes} GPUs for an engine: set score.gpus_per_actor to {processes}")
    # vLLM would choose Ray where it finds itself in an actor, and ask for GPUs that the actor has already
    arguments.setdefault("distributed_executor_backend", "uni" if processes == 1 else "mp")
    return arguments


def _overrides(spec: ModelSpec, length: int) -> dict[str, Any]:
    # logits in float32 whatever the weights are, as in `token_loss`
    overrides: dict[str, Any] = {"head_dtype": "float32"}
    config = read_config(spec.path, spec.trusted, spec.revision)
    rope = getattr(config, "rope_parameters", None) or {}
    # rotary positions go on beyond the limit that the config names, as they do in transformers
    unlimited = rope.get("rope_type", None) in ("default", "llama3")
    if unlimited and getattr(config, "max_position_embeddings", length) < length:
        overrides["max_position_embeddings"] = length
    return overrides


def _lora_rank(adapter: Path) -> int:
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    room = next((r for r in LORA_RANKS if r >= rank), None)
    if room is None:
        raise UserError(f"model.reference {adapter}: rank {rank}; vLLM takes ranks up to {LORA_RANKS[-1]}: merge it")
    return room


def _check_names(arguments: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in arguments:
        if name not in known:
            raise UserError(f"score.vllm.{name} is not an argument of this vLLM's engine{nearest(name, known)}")


def _advice(error: BaseException) -> str:
    reason = _line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, reason):
        return (
            f"out of memory ({reason}): lower score.batch_tokens or data.max_length; give the engine more GPUs "
            "(score.gpus_per_actor); or set score.vllm.gpu_memory_utilization, kv_cache_memory_bytes on a CPU"
        )
    return f"{reason}; set score.backend: transformers to do without vLLM"


def _line(error: BaseException) -> str:
    """An exception's message in one line; of several the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return why(error)
