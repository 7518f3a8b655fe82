"""Seeds: every random draw of a run is derived from one root seed and the name of what it is for."""

import hashlib
import random

import numpy as np
import torch


def derive_seed(root: int, *names: str | int) -> int:
    """Return a seed in [0, 2**63) that depends on `root` and the path `names` only.

    Independent streams for independent uses (a shard, an epoch, a student) without any shared generator, so
    that the result does not depend on the order, or on the number of workers, in which they are drawn.
    """
    path = "/".join(f"{type(name).__name__}:{name}" for name in (root, *names))
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
