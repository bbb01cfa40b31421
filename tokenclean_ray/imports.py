"""Import torch and transformers in less time."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """An eighth faster (10.9 to 9.6 s of CPU): the garbage collector would look again and again through millions of
    objects that stay, and then leaves them alone."""
    if not gc.isenabled():  # within another one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
