"""Sionna's random numbers under one seed, whatever ran before in the process."""

import contextlib
from collections.abc import Iterator

import torch
from sionna.phy import config as sionna_config


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Sionna and torch and hold torch to one thread without gradients; leave the caller's torch as it was."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    sionna_config.seed = seed
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
