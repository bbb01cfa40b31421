"""FSDP2 on gloo, of one rank in a process of its own; of more ranks: test_train; killed ones: test_train_faults."""

import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_token_loss import VOCAB, build
from test_train import SETTINGS, masked_rows

from tokenclean_ray.config import Train
from tokenclean_ray.errors import UserError
from tokenclean_ray.finetune import IGNORED, Rows, fit, make_optimizer, train_steps
from tokenclean_ray.sharded import restore_checkpoint, save_checkpoint, shard
from tokenclean_ray.token_loss import TokenLoss


def _with_an_idle_weight():
    model = make_llama(0, scale=2.0)
    model.model.idle = torch.nn.Linear(4, 4)
    return TokenLoss(model)


def _resumed(folder):
    """Losses of four steps, and of the last two of them from a checkpoint; what is left of the weights' distance."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    rows, settings = Rows.of(masked_rows()), Train(**{**SETTINGS, "method": "full", "data": "x"})
    curves, models = [], []
    for first in (0, 2):
        loss_of = _with_an_idle_weight()
        shard(loss_of, gpu=False)
        optimizer = make_optimizer(loss_of, settings)
        if first:
            assert restore_checkpoint(folder, loss_of, optimizer) == {"step": 2}
        steps = train_steps(loss_of, optimizer, rows, settings, seed=0, first_step=first)
        for step, loss, _ in itertools.islice(steps, 4 - first):
            curves.append(loss)
            if step == 1:
                save_checkpoint(folder, loss_of, optimizer, {"step": 2}, rank=0)
        models.append({name: weight.full_tensor() for name, weight in loss_of.named_parameters()})
    same = all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    return curves, same


@pytest.mark.train
def test_a_weight_that_gets_no_gradient_survives_a_checkpoint(tmp_path):
    """DeepSeek V3.2 has some that only choose what others see; the optimiser knows nothing of them."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        curves, same = pool.submit(_resumed, str(tmp_path)).result()
    assert curves[2:4] == curves[4:]
    assert same


def _refused(folder, damage):
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    loss_of = TokenLoss(make_llama(0))
    shard(loss_of, gpu=False)
    settings = Train(**{**SETTINGS, "method": "full", "data": "x"})
    optimizer = make_optimizer(loss_of, settings)
    next(train_steps(loss_of, optimizer, Rows.of(masked_rows()), settings, seed=0))
    save_checkpoint(folder, loss_of, optimizer, {"step": 1}, rank=0)
    (shards,) = Path(folder).glob("*.safetensors")
    match damage:
        case "a file is cut short":
            shards.write_bytes(shards.read_bytes()[:-100])
        case "a tensor is lost":
            tensors = load_file(shards)
            tensors.popitem()
            with safe_open(shards, "pt") as file:
                metadata = file.metadata()
            save_file(tensors, shards, metadata)
        case "all tensors are lost":
            shards.unlink()
        case "its progress is lost":
            (Path(folder) / "progress.json").unlink()
    with pytest.raises(UserError) as error:
        restore_checkpoint(folder, loss_of, optimizer)
    return str(error.value)


@pytest.mark.train
@pytest.mark.parametrize(
    "damage", ["a file is cut short", "a tensor is lost", "all tensors are lost", "its progress is lost"]
)
def test_a_damaged_checkpoint_is_never_gone_on_from(tmp_path, damage):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        error = pool.submit(_refused, str(tmp_path), damage).result()
    assert error.startswith("the newest checkpoint is damaged, or of an older version of tokenclean_ray (")
    assert error.endswith("): delete the run's folder under train/ and run the same command again")
    assert "\n" not in error


def _curves_of_nested_layers(folder):
    """Of Mamba, whose mixers are sharded within its layers: in one process, sharded, and sharded in half precision."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    rows = Rows.of([(ids % VOCAB, np.where(labels == IGNORED, IGNORED, ids % VOCAB)) for ids, labels in masked_rows()])
    settings = Train(**{**SETTINGS, "method": "full", "activation_checkpointing": False, "data": "x"})
    curves = []
    for sharded, half in ((False, None), (True, None), (True, torch.bfloat16)):
        loss_of = TokenLoss(build("mamba"))
        if sharded:
            shard(loss_of, gpu=False, half=half)
        curves.append(fit(loss_of, rows, settings))
    return curves


@pytest.mark.train
def test_layers_within_layers_are_sharded(tmp_path):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        alone, sharded, half = pool.submit(_curves_of_nested_layers, str(tmp_path)).result()
    assert sharded == pytest.approx(alone, abs=1e-4)
    assert half == pytest.approx(alone, abs=0.1)
    assert half != pytest.approx(alone, abs=1e-5)
