"""What the Hugging Face hub, or its cache on this machine, says of a model without its weights.

Input: a hub id. Output: its commit, a fingerprint of what decides its losses, the size of its weights.
"""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

from tokenclean_ray.digest import digest
from tokenclean_ray.errors import UserError, why
from tokenclean_ray.storage import failures

HUB_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # not a second copy, as Mistral and OpenAI give


def hub_model(name: str, trusted: bool) -> tuple[str, str, int]:
    """The newest commit, or the cached one where HF_HUB_OFFLINE is set; the model's fingerprint; its weights' bytes.

    The fingerprint is of the config and the weights, as a folder's, by what the hub names contents by: most commits
    change a card alone. Where that is not known, and where the model's own code may run, it is the commit.
    """
    try:
        info = huggingface_hub.HfApi().model_info(name, files_metadata=True)
        revision, siblings = str(info.sha), info.siblings or []
        ids = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in siblings}
        sizes = {file.rfilename: file.size or 0 for file in siblings}
    except failures(ValueError) as error:
        # not where the network failed, which would decide on an old commit
        folder = _cached(name) if HF_HUB_OFFLINE else None
        if folder is None:
            raise UserError(f"model {name}: neither a folder nor a model that the hub gives ({why(error)})") from error
        revision, cached = folder.name, list(folder.iterdir())
        ids = {file.name: file.resolve().name if file.is_symlink() else None for file in cached}
        sizes = {file.name: file.stat().st_size for file in cached}
    tensors = [file for file in sorted(ids) if file.endswith(".safetensors") and "/" not in file]
    weights = [file for file in tensors if HUB_WEIGHTS.fullmatch(file)]
    if "model.safetensors" in weights:  # which transformers takes, whatever else there is
        weights = ["model.safetensors"]
    telling = [(file, ids.get(file)) for file in ("config.json", *weights)]
    known = weights and all(id for _, id in telling) and not trusted
    return revision, digest(telling, 16) if known else revision[:16], sum(sizes[file] for file in weights or tensors)


def _cached(name: str) -> Path | None:
    """A hub model's folder in the cache, named after its commit: that of main, or the only one."""
    main = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(main, str):
        return Path(main).parent
    found = list(Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").glob("*/config.json"))
    return found[0].parent if len(found) == 1 else None
