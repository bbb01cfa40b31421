"""What this machine can do: a matrix product, a copy in memory, a file. Output: a dict of figures. Needs no Ray."""

import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tokenclean_ray.memory import process_memory

Found = TypeVar("Found")  # of `alone`

# of a server that has imported what all of them would, and nothing else; where there is a GPU, a process that is forked
# after importing torch never comes to itself (seen with torch 2.11 and driver 580)
processes: Any = get_context("spawn" if torch.cuda.is_available() else "forkserver")
processes.set_forkserver_preload(["torch", "transformers", "peft"])


def machine(device: str) -> dict[str, Any]:
    """Operations and bytes a second; the product is in the precision that models have on the device."""
    dtype = getattr(torch, dtype_on(device))
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    flops = _rate(lambda: torch.mm(a, b), 2 * size**3, 2.0, device)
    source, target = (np.ones(1 << 27, np.uint8) for _ in range(2))
    copied = _rate(lambda: np.copyto(target, source), len(source), 0.5, "cpu")
    with tempfile.NamedTemporaryFile() as file:
        began = time.perf_counter()
        file.write(source.tobytes())
        file.flush()
        os.fsync(file.fileno())
        written = len(source) / (time.perf_counter() - began)
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "matmul_flops": flops,
        "matmul_dtype": dtype_on(device),
        "copy_bytes": copied,
        "disk_bytes": written,
    }


def _cpu() -> str:
    """Its own name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _rate(work: Callable[[], Any], amount: float, seconds: float, device: str) -> float:
    """Amount a second, after a first call that does not count."""
    work()
    wait(device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        wait(device)
        calls += 1
    return calls * amount / (time.perf_counter() - began)


def device_here() -> str:
    """cuda where there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_on(device: str) -> str:
    """What models are in there."""
    return "bfloat16" if device == "cuda" else "float32"


def baselines(device: str) -> dict[str, bool]:
    """What people write first, by name, and whether torch may compute its attention by cuDNN.

    On a GPU torch ≥ 2.11 prefers cuDNN, which plans anew for each shape of a batch: that flatters a ratio.
    """
    return {"baseline": True, "baseline_without_cudnn": False} if device == "cuda" else {"baseline": True}


def add_baselines(record: dict[str, Any], device: str, written_first: Callable[[bool], dict[str, Any]]) -> None:
    """Measure what people write first, add it to a record beside `ours`, and how many times as fast ours is.

    Args:
        written_first: figures, by whether cuDNN may be used; a `difference` of results, its own or none, is added as
            the `largest_difference`.
    """
    for name, cudnn in baselines(device).items():
        record[name] = written_first(cudnn)
        record[f"times_{name}"] = record["ours"]["tokens_per_s"] / record[name]["tokens_per_s"]
        if "difference" in record[name]:
            record["largest_difference"] = max(record[name].pop("difference"), record.get("largest_difference", 0.0))


def alone(function: Callable[..., Found], *arguments: Any) -> Found:
    """What a function returns in a process of its own, whose memory is its own, its allocator's settings too."""
    with ProcessPoolExecutor(1, processes) as pool:
        return pool.submit(function, *arguments).result()


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> int:
    """Most bytes so far: of the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_memory()
