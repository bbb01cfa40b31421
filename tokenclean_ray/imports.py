"""Import torch and transformers in less time, and with the same kernels everywhere."""

import contextlib
import gc
import os
import platform
from collections.abc import Iterator

# Torch's AVX-512 kernels round differently (losses move by up to 3e-4 nats in long rows) and are not faster (on two
# busy cores of an Intel Xeon by 1 %): with one kind of kernel a loss depends less on the node, but for MKL's products
KERNELS = {"ATEN_CPU_CAPABILITY": "avx2"} if platform.machine() in ("x86_64", "AMD64") else {}


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch within: it reads `KERNELS` from the environment, where they stay.

    The garbage collector is off meanwhile, since it would look again and again through millions of objects that are
    never freed: an eighth faster (10.9 to 9.6 s of CPU). Then it leaves them alone.
    """
    os.environ |= KERNELS
    if not gc.isenabled():  # within another one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
