"""Kernels for GPUs: norms that are fused compute as before, others are left alone; grouped heads; losses that are read
once."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_llama, save
from test_token_loss import build, rows, score_rows
from torch import nn
from transformers.integrations import sdpa_attention

from tokenclean_ray import kernels
from tokenclean_ray.kernels import _loss_kernel, fuse_attention, fuse_norms, losses_of
from tokenclean_ray.models import load_model
from tokenclean_ray.token_loss import TokenLoss


@pytest.mark.parametrize(
    ("name", "count"),
    # of each layer two, of Qwen3's attention two more; one at the end
    [("llama", 5), ("qwen3", 9), ("mixtral", 5), ("phi3", 5), ("gemma2", 0), ("gemma3", 0), ("gpt2", 0)],
)
def test_losses_under_fused_norms_are_those_of_the_model(name, count):
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    _, _, ids, mask, offsets = rows()
    expected = score_rows(TokenLoss(model), ids, mask, offsets, batch_tokens=150)
    assert fuse_norms(model) == count
    np.testing.assert_allclose(score_rows(TokenLoss(model), ids, mask, offsets, batch_tokens=150), expected, atol=2e-4)


class OddRMSNorm(nn.Module):
    """Computes something else under the usual name, as configured."""

    def __init__(self, kind):
        super().__init__()
        self.weight, self.variance_epsilon, self.kind = nn.Parameter(torch.ones(8)), 1e-6, kind

    def forward(self, x):
        epsilon = 1e-5 if self.kind == "another epsilon" else self.variance_epsilon
        weight = self.weight + (self.kind == "one more")
        mean = x - x.mean(-1, keepdim=True) if self.kind == "mean" else x
        return weight * mean * torch.rsqrt(mean.pow(2).mean(-1, keepdim=True) + epsilon)


@pytest.mark.parametrize(
    ("kind", "fused"),
    [("plain", 1), ("another epsilon", 0), ("one more", 0), ("mean", 0), ("hooked", 0), ("in float64", 0)],
)
def test_what_only_has_the_name_of_a_norm_is_left(kind, fused):
    norm = OddRMSNorm(kind)
    if kind == "hooked":  # as by accelerate, where a model is spread over GPUs
        norm.forward = norm.forward
    if kind == "in float64":
        norm.double()
    x = torch.randn(3, 8)
    expected = norm(x)
    assert fuse_norms(nn.ModuleList([nn.Linear(8, 8), norm])) == fused
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("block", [1, 3 * 70, 10**6])
def test_losses_on_a_cpu_are_log_softmax(monkeypatch, block):
    monkeypatch.setattr(kernels, "CPU_BLOCK_LOGITS", block)
    logits = 5 * torch.randn(40, 70)
    logits[1, 1:] = -torch.inf
    logits[2, 3] = torch.nan
    logits[3] = -1e30
    logits[4, 5] = torch.inf
    labels = torch.randint(0, 70, (40,))
    labels[1] = 0
    expected = nn.functional.cross_entropy(logits.double(), labels, reduction="none").float()
    torch.testing.assert_close(losses_of(logits.requires_grad_(), labels), expected, equal_nan=True)
    with torch.inference_mode():
        found = losses_of(logits.detach().clone(), labels)
        assert losses_of(logits[:0].detach().clone(), labels[:0]).shape == (0,)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6, equal_nan=True)
    assert found[2].isnan()


@pytest.mark.parametrize("error", [AssertionError("libcuda.so cannot found!"), OSError(), RuntimeError(), "of Triton"])
def test_a_kernel_that_triton_cannot_build_is_done_without(monkeypatch, error):
    class TritonError(Exception):
        pass

    class Kernel:
        def __getitem__(self, grid):
            raise TritonError("sm_999 is not a recognized processor") if isinstance(error, str) else error

    errors, kernel = ModuleType("triton.errors"), ModuleType("loss_kernel")
    errors.TritonError, kernel.loss_kernel = TritonError, Kernel()
    monkeypatch.setitem(sys.modules, "triton.errors", errors)
    monkeypatch.setitem(sys.modules, "tokenclean_ray.loss_kernel", kernel)
    on_cpu = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kind: on_cpu(*shape, **kind))
    assert _loss_kernel.__wrapped__() is None


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [5, 512, 4096, 4097, 128_256])
def test_losses_by_the_kernel(vocabulary):
    assert _loss_kernel() is not None  # a C compiler and Python's headers are here
    logits = 5 * torch.randn(40, vocabulary, device="cuda")
    logits[1, 1:] = -torch.inf
    logits[2, 3] = torch.nan
    logits[3] = -1e30
    labels = torch.randint(0, vocabulary, (40,), device="cuda")
    labels[1] = 0
    expected = nn.functional.cross_entropy(logits.double(), labels, reduction="none").float()
    with torch.inference_mode():
        found = losses_of(logits, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6, equal_nan=True)
    assert found[2].isnan()


@pytest.mark.parametrize(
    ("dtype", "capability", "grouped"),
    [
        (torch.bfloat16, (8, 0), True),
        (torch.float16, (9, 0), True),
        (torch.float32, (9, 0), False),
        (torch.float16, (7, 5), False),
    ],
)
def test_heads_stay_in_groups_where_a_fused_kernel_takes_them(monkeypatch, dtype, capability, grouped):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    key = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=dtype, shape=(1, 2, 8, 64))
    fuse_attention()
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is grouped
    assert not sdpa_attention.use_gqa_in_sdpa("a mask", key, key)
    assert sdpa_attention.use_gqa_in_sdpa(None, torch.zeros(1, 2, 8, 64), key)  # a CPU's kernel takes all of them


def test_heads_that_are_repeated_attend_as_those_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    model = load_model(save(tmp_path / "m", make_llama(num_key_value_heads=2)), torch.float32, "cpu")
    assert sdpa_attention.use_gqa_in_sdpa is kernels._takes_groups
    ids = torch.arange(20)[None]
    with torch.no_grad():
        grouped = model(ids).logits
        monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
        torch.testing.assert_close(model(ids).logits, grouped)
