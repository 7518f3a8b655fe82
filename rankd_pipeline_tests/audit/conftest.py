"""A pool of simulated drops, made once, from which every test draws its own clean corpus."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.audit_catalogue import clean_pool
from rankd_pipeline.audit.faults import Corpus, resample


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    torch.set_num_threads(1)
    return clean_pool(2600, seed=11)


@pytest.fixture(scope="session")
def make_clean(pool: Corpus) -> Callable[[int], Corpus]:
    return lambda seed: resample(pool, np.random.default_rng(seed), 0.6)
