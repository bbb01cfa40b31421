"""What is faster than the modules of torch and transformers: norms, attention on GPUs, losses. Needs no Ray.

On an H200 16,384 tokens of a Llama of 1B in bfloat16 took 93 to 102 ms: norms that are fused save 9 to 13. Of the 6 to
7 that log-softmax takes, losses that are read once save three quarters.
"""

import copy
import subprocess
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

CPU_BLOCK_LOGITS = 1 << 18  # 1 MB of float32; 256 kB to 1 MB differ by little, 4 MB are a third slower


class _FusedRMSNorm(nn.Module):
    """Takes the place of a module's class: one kernel instead of six, float32 within, as they have it."""

    weight: Tensor
    fused_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.fused_epsilon)


def fuse_norms(model: nn.Module) -> int:
    """Make a model's root mean square norms one kernel each, those that are found to compute just that.

    Not those of Gemma, which add 1 to their weights. Returns how many.
    """
    fused, dtype = 0, next(model.parameters()).dtype
    module: Any
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not (type(module).__name__.endswith("RMSNorm") and isinstance(epsilon, float)):
            continue
        if _is_plain(module, epsilon) and module.weight.dtype == dtype:  # of another dtype torch's result is, too
            module.fused_epsilon = epsilon
            module.__class__ = _FusedRMSNorm
            fused += 1
    return fused


def _is_plain(module: Any, epsilon: float) -> bool:
    """By trying a copy with other weights on numbers so small that the epsilon counts: names promise nothing."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or len(list(module.parameters())) != 1 or "forward" in vars(module):
        return False
    generator = torch.Generator().manual_seed(0)
    small, weights = torch.randn(2, len(weight), generator=generator)
    tried = copy.deepcopy(module).float().cpu()
    tried.weight.data.copy_(weights)
    small = small[None] * epsilon**0.5
    with torch.no_grad():
        expected = nn.functional.rms_norm(small, weights.shape, weights, epsilon)
        return torch.allclose(tried(small), expected, rtol=1e-4, atol=0)


_use_gqa = sdpa_attention.use_gqa_in_sdpa


def fuse_attention() -> None:
    """Have transformers repeat heads of keys and values where torch has no fused kernel that takes groups of them.

    In float32, and on GPUs before Ampere, it has none (torch 2.13), and would hold scores of all pairs of tokens.
    """
    sdpa_attention.use_gqa_in_sdpa = _takes_groups


def _takes_groups(mask: Tensor | None, key: Tensor, *more: Any) -> bool:
    fused = not key.is_cuda or (key.dtype != torch.float32 and torch.cuda.get_device_capability(key.device) >= (8, 0))
    return fused and _use_gqa(mask, key, *more)


def losses_of(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    """(n,) float32 losses of labels under float32 logits; where no gradient is wanted the logits may be overwritten."""
    if not torch.is_grad_enabled():
        if logits_nV.device.type == "cpu":
            return _losses_in_blocks(logits_nV, labels_n)
        if logits_nV.is_cuda and (kernel := _loss_kernel()):
            losses_n = torch.empty(len(labels_n), device=logits_nV.device)
            with torch.cuda.device(logits_nV.device):
                kernel[(len(labels_n),)](logits_nV, labels_n, losses_n, logits_nV.shape[1], logits_nV.stride(0))
            return losses_n
    return -torch.log_softmax(logits_nV, -1).gather(-1, labels_n[:, None])[:, 0]


def _losses_in_blocks(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    """In place, a few rows at a time, which stay in a core's cache: log-softmax takes twice as long."""
    at_label_n = logits_nV.gather(-1, labels_n[:, None])[:, 0]
    greatest, total = [], []
    for logits_bV in logits_nV.split(max(1, CPU_BLOCK_LOGITS // logits_nV.shape[1])):
        greatest_b1 = logits_bV.amax(-1, keepdim=True)
        greatest.append(greatest_b1[:, 0])
        total.append(logits_bV.sub_(greatest_b1).exp_().sum(-1))
    # the difference first: beside a large logit the logarithm would be rounded away
    return (torch.cat(greatest) - at_label_n) + torch.cat(total).log()


@cache
def _loss_kernel() -> Any:
    """None where Triton cannot build it: it wants a C compiler and Python's headers, and to know the GPU."""
    try:
        from triton.errors import TritonError

        from tokenclean_ray.loss_kernel import loss_kernel
    except ImportError:
        return None
    try:
        one = torch.zeros(1, 16, device="cuda")
        loss_kernel[(1,)](one, torch.zeros(1, dtype=torch.int64, device="cuda"), one, 16, 16)
    except (OSError, RuntimeError, AssertionError, TritonError, subprocess.CalledProcessError):  # all of them met
        return None
    return loss_kernel
