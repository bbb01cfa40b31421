"""All Ray Train wiring: fine-tune a model on a masked dataset, sharded over workers, resumable at any step.

Input: Parquet files with input_ids and labels, a start model. Output: an ordinary Hugging Face folder, committed by a
manifest that is written last. The same call again finds that manifest, or goes on from the newest checkpoint.
"""

import contextlib
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from tensorboardX import SummaryWriter

from tokenclean_ray.config import Config, Train
from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import make_optimizer, train_steps
from tokenclean_ray.layout import GOES_ON, TRAINED, Store
from tokenclean_ray.masked_rows import MaskedRows, check_rows
from tokenclean_ray.models import NO_CUDA, ModelSpec, load_tokenizer, out_of_memory
from tokenclean_ray.progress import Stage, say
from tokenclean_ray.sharded import gather, restore_checkpoint, save_checkpoint, shard
from tokenclean_ray.storage import failure, failures
from tokenclean_ray.token_loss import TokenLoss
from tokenclean_ray.trainable import save_trained, trainable
from tokenclean_ray.workers import WORKER_ENVIRONMENT, on_gpu

# settings that change rounding at most; a training that ran out of memory goes on with other ones
NOT_SHAPING = {
    *("data", "model", "num_workers", "label_selector", "batch_tokens", "activation_checkpointing"),
    *("checkpoint_every_steps", "tensorboard"),
}
PROGRESS_EVERY_S = 5.0
Found = TypeVar("Found")  # of `_together`
WORKER_FAILURES = 3  # one after another, without a checkpoint in between; nodes that are drained first do not count


@dataclass(frozen=True)
class Job:
    """One fine-tuning, as its workers receive it."""

    store: Store
    name: str
    """Folder under models/; ends in a hash of what decides the result, so that it never names two."""
    files: tuple[str, ...]
    """URLs of Parquet files."""
    start: ModelSpec
    config: Config
    tokenizer: ModelSpec
    """Whose tokenizer made the rows."""

    def half(self, gpu: bool) -> torch.dtype | None:
        """What forward and backward passes compute in; None: float32. Of the halves the one without loss scaling."""
        dtype = self.config.model.dtype
        return torch.bfloat16 if dtype in ("bfloat16", "float16") or (dtype == "auto" and gpu) else None


def job_for(
    store: Store,
    name: str,
    files: list[str],
    identity: str,
    start: ModelSpec,
    config: Config,
    tokenizer: ModelSpec,
) -> Job:
    """A job whose name tells what decides its result.

    Args:
        name: readable, such as round-1.
        identity: of the rows and labels in the files.
        tokenizer: the model whose tokenizer made the rows.
    """
    shaping = config.train.model_dump(mode="json", exclude=NOT_SHAPING)
    unusual = [value for value in (config.model.dtype, config.data.template) if value not in ("auto", "chat")]
    fingerprint = digest([start.fingerprint, identity, shaping, config.seed, *unusual])
    return Job(store, f"{name}-{fingerprint}", tuple(files), start, config, tokenizer)


def fine_tune(job: Job) -> dict[str, Any]:
    """Run a job to its end, or find that it has been.

    Returns:
        the manifest: `files`, `steps`, `tokens` (trained on), `loss` (of every step), `seconds`.

    Raises:
        UserError: an empty dataset, token ids beyond the vocabulary, NaN loss, memory, too few GPUs, a full disk,
            workers that keep dying.
    """
    if _trained(job) is None:
        job.store.delete(_progress_file(job))  # of an attempt before, which may have come further than its checkpoint
        ended = threading.Event()
        with Stage("train", 0, unit="updates") as stage:
            follower = threading.Thread(target=_follow, args=(job, stage, ended), daemon=True)
            follower.start()
            try:
                _run(job)
            finally:
                ended.set()
                follower.join()
    done = _trained(job)
    if done is None:
        raise RuntimeError(f"training {job.name} ended without a model")
    curve = f"tensorboard/{job.name}"
    if job.config.train.tensorboard and not job.store.names(curve):
        with tempfile.TemporaryDirectory() as folder:  # its writer knows fewer stores
            with SummaryWriter(folder) as writer:
                for step, loss in enumerate(done["loss"], 1):
                    writer.add_scalar("train/loss", loss, step)
            job.store.put_folder(folder, curve)
    return done


def _trained(job: Job) -> dict[str, Any] | None:
    """The manifest of a job's model; None where there is none, or the model has lost files that it names."""
    folder = f"models/{job.name}"
    done: dict[str, Any] | None = job.store.read_json(f"{folder}/{TRAINED}")
    if done and (lost := set(done.get("files", ())).difference(job.store.names(folder))):
        say(f"{job.store.url}/{folder} has lost {min(lost)}: it is trained again")
        job.store.delete(f"{folder}/{TRAINED}")
        return None
    return done


def _run(job: Job) -> None:
    settings = job.config.train
    workers, resources = _workers(settings, job.config.model.device)
    api: Any = ray.train  # its annotations are those of the API before
    trainer = api.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=api.ScalingConfig(
            num_workers=workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            label_selector=settings.label_selector or None,
        ),
        run_config=api.RunConfig(
            name=job.name,
            storage_path=job.store.url + "/train",
            failure_config=api.FailureConfig(max_failures=0),  # `_fit` counts them; of drained nodes Ray does
            checkpoint_config=api.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    told = _fit(trainer, job)
    if "user_error" in told:
        raise UserError(told["user_error"])


def _fit(trainer: Any, job: Job) -> dict[str, Any]:
    """What the workers return; where some die, from the newest checkpoint on, as long as there are new ones.

    Ray has one limit for the whole of a training, which days on nodes that come and go would reach.
    """
    failed, saved, before = 0, 0, _places()
    interrupts = signal.getsignal(signal.SIGINT)
    while True:
        try:
            return trainer.fit().return_value or {}
        except ray.train.TrainingFailedError as error:
            ended = _trained(job) is not None  # its controller failed as it ended the workers
            now = (job.store.read_json(_progress_file(job)) or {}).get("saved", 0)
            failed, saved = 1 if now > saved else failed + 1, max(saved, now)
            cause = _causes(error)[0]
            bug = isinstance(error, ray.train.ControllerError) and not isinstance(cause, RayActorError)
            if not ended and (failed > WORKER_FAILURES or bug):
                if why := _explained(error):
                    raise UserError(why) from error
                raise
            _free_places(_places() - before)
            if ended:
                return {}
            say(f"training goes on from its newest checkpoint ({failure(cause)})")
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupts)  # Ray leaves its own, which ends the process with exit code 0


def _places() -> set[str]:
    """The placement groups of this job, whose id is the end of theirs."""
    job = ray.get_runtime_context().get_job_id()
    return {of for of, found in placement_group_table().items() if of.endswith(job) and found["state"] != "REMOVED"}


def _free_places(left: set[str]) -> None:
    """Remove the placement groups that a failed training has left: what comes next would wait for them for ever.

    Ray's controller leaves them where it cannot reach a worker that it is to end; Ray removes them when the job ends
    (ray-project/ray issue 65881).
    """
    for group in left:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def _progress_file(job: Job) -> str:
    return f"train/{job.name}.json"


def _follow(job: Job, stage: Stage, ended: threading.Event) -> None:
    """Show what the first rank writes of its progress, until the end."""
    step = tokens = 0
    last = False
    while not last:
        last = ended.wait(PROGRESS_EVERY_S)
        with contextlib.suppress(*failures(), UserError):  # a line less
            now = job.store.read_json(_progress_file(job))
            if now and now["step"] > step:
                if not step:  # what was done before does not count for the speed
                    tokens = now["began"]
                    stage.expect(now["of"], now["tokens_of"] - tokens)
                stage.advance(parts=now["step"] - step, tokens=now["tokens"] - tokens, note=f"loss {now['loss']:.4f}")
                step, tokens = now["step"], now["tokens"]


def _explained(error: Exception) -> str | None:
    """What a user can do about what ended training; None for what is a bug."""
    causes = _causes(error)
    if any(map(out_of_memory, [error, *causes])):  # Ray cuts the middle out of long messages
        return "training ran out of memory: lower train.batch_tokens, or use more workers"
    if isinstance(error, ray.train.ControllerError) and "NCCL" in str(error):
        return NO_CUDA
    for cause in causes:
        if isinstance(cause, failures()):
            return f"{failure(cause)}; {GOES_ON}"
        if isinstance(cause, RayActorError):
            return f"training workers keep dying ({failure(cause)}); Ray's logs know more; {GOES_ON}"
    return None


def _causes(error: Exception) -> list[Exception]:
    """What befell each worker, first those that died, whose end the others' follows from; or Ray's controller."""
    found = getattr(error, "worker_failures", {}).values() or [getattr(error, "controller_failure", error)]
    causes = [getattr(cause, "health_check_failure", cause) for cause in found]
    return sorted(causes, key=lambda cause: not isinstance(cause, RayActorError))


def _workers(settings: Train, device: str) -> tuple[int | tuple[int, int], dict[str, float]]:
    """Number of workers (or their range) and what each asks for."""
    gpu = on_gpu(device)
    have = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
    wanted = settings.num_workers
    if settings.label_selector and not isinstance(wanted, int):
        # Ray asks for as many as all nodes hold, and where fewer have the labels it waits for ever
        raise UserError("train.num_workers: auto and [min, max] count all nodes: with a label_selector give a number")
    if wanted == "auto":
        wanted = have if gpu else 1
    least = wanted[0] if isinstance(wanted, tuple) else wanted
    if least == 0:
        raise UserError("train.num_workers: auto is one for each GPU, and the cluster has none yet: give a number")
    if device == "auto" and least > have:
        kind = "GPUs" if gpu else "CPUs and no GPU"
        raise UserError(
            f"train.num_workers is {least}, but the cluster has {have} {kind}: lower it, or, where nodes are still to "
            "come, set model.device to cpu or gpu"
        )
    if gpu:
        return wanted, {"GPU": 1, "CPU": 1}
    if settings.label_selector:
        return wanted, {"CPU": 1}  # how many the nodes have that may train is not known
    cpus = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return wanted, {"CPU": max(1, int(cpus) // least)}


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs; what the user can mend is returned, since Ray would try again after an exception."""
    try:
        _train(config["job"])
    except UserError as error:
        return {"user_error": str(error)}
    return {}


def _train(job: Job) -> None:
    settings = job.config.train
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    gpu = bool(ray.get_gpu_ids())
    if gpu:  # a model that is too large for one is loaded and checked on the CPU, of which Ray gives us one thread
        sharing = context.get_local_world_size() if rank else 1  # the first checks it, when the others are done
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharing))
    else:
        torch.set_num_threads(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    rows, loss_of = _prepare(job, gpu, rank, ranks)
    shard(loss_of, gpu, job.half(gpu))
    optimizer = make_optimizer(loss_of, settings)
    progress: dict[str, Any] = {"step": 0, "loss": [], "tokens": 0, "seconds": 0.0}
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            progress = restore_checkpoint(folder, loss_of, optimizer)
    began, told = time.monotonic() - progress["seconds"], 0.0
    of = {
        "of": -(-len(rows.lengths) // settings.batch_rows) * settings.epochs,
        "tokens_of": int(rows.kept.sum()) * settings.epochs,
        "began": progress["tokens"],
        "saved": progress["step"],
    }
    for step, share, tokens in train_steps(
        loss_of, optimizer, rows, settings, seed=job.config.seed, first_step=progress["step"], rank=rank, ranks=ranks
    ):
        loss = torch.tensor(share, dtype=torch.float64, device=loss_of.device)
        dist.all_reduce(loss)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss of step {step + 1} is {loss.item()}: lower train.learning_rate, check the model")
        progress["step"] = step + 1
        progress["loss"].append(round(loss.item(), 6))
        progress["tokens"] += tokens
        progress["seconds"] = round(time.monotonic() - began, 3)
        if saves := (step + 1) % settings.checkpoint_every_steps == 0:
            with tempfile.TemporaryDirectory() as folder:
                save_checkpoint(folder, loss_of, optimizer, progress, rank)
                report = {"step": progress["step"], "loss": progress["loss"][-1]}
                ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(folder))
            of["saved"] = progress["step"]
        if rank == 0 and (saves or time.monotonic() - told > PROGRESS_EVERY_S or step + 1 == of["of"]):
            told = time.monotonic()
            with contextlib.suppress(*failures()):
                job.store.write_json(_progress_file(job), of | progress | {"loss": progress["loss"][-1]})
    weights = gather(loss_of)
    if rank == 0:
        export(job, weights, progress)


def _prepare(job: Job, gpu: bool, rank: int, ranks: int) -> tuple[MaskedRows, TokenLoss]:
    """The rows, and the model as it is trained, which the first rank alone compares to its own logits."""

    def load() -> tuple[MaskedRows, TokenLoss]:
        rows = MaskedRows(job.files)
        check_rows(rows, job.start)
        settings, half = job.config.train, job.half(gpu)
        return rows, trainable(job.start, settings, job.config.seed, half, gpu, check=rank == 0)

    rows, loss_of = _together(load, ranks)
    found = [loss_of.full_logits]
    dist.broadcast_object_list(found)
    loss_of.full_logits = found[0]
    return rows, loss_of


def _together(work: Callable[[], Found], ranks: int) -> Found:
    """What every rank does by itself; where one raises `UserError` all do, since the others would wait for it."""
    error = None
    try:
        found = work()
    except UserError as mine:
        error = str(mine)
    errors: list[str | None] = [None] * ranks
    dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise UserError(first)
    return found


def export(job: Job, weights: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write the trained model, see `save_trained`, then its manifest; `weights`: what was trained."""
    of, config = job.tokenizer, job.config
    tokenizer = load_tokenizer(of.path, of.trusted, of.revision)
    with tempfile.TemporaryDirectory() as folder:
        tulu = config.data.template == "tulu"
        save_trained(folder, job.start, config.train, config.seed, weights, tokenizer, tulu)
        job.store.put_folder(folder, f"models/{job.name}")
        files = sorted(name for name in os.listdir(folder) if name[0] != ".")  # as `Store.names` has them
    manifest = {
        "files": files,
        "start": job.start.fingerprint,
        "train": config.train.model_dump(mode="json"),
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "seconds": progress["seconds"],
        "loss": progress["loss"],
    }
    job.store.write_record(f"models/{job.name}/{TRAINED}", manifest)
