"""Comparing checks on columns of complex numbers, and the search for near copies in many dimensions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.audit.patterns import Sample, _nearest_elsewhere, component_order
from rankd_pipeline.audit.schema import ColumnSpec
from rankd_pipeline.ran_functions.channel_estimation.function import ChannelEstimation

SCHEMA = ChannelEstimation().schema(ChannelEstimation().corpus_config({}))
LS = next(spec for spec in SCHEMA.columns if spec.name == "ls")
SITES = ("a", "b", "c", "los")
ROWS = 600


def estimates(rng: np.random.Generator, los: bool) -> np.ndarray:
    """[ROWS, 2, 2, 12]: fading over twelve estimates; with a line of sight that turns one way between the DMRS symbols."""
    at = np.arange(12)
    root = np.linalg.cholesky(0.8 ** np.abs(at[:, None] - at) + 1e-6 * np.eye(12))
    noise = rng.normal(size=(2, ROWS, 1, 12)) @ root.T
    h = np.repeat((noise[0] + 1j * noise[1]) / np.sqrt(2), 2, axis=1)
    if los:
        phase = rng.uniform(0, 2 * np.pi, ROWS)[:, None, None]
        h = 0.3 * h + np.exp(1j * (phase + np.array([0.0, 1.6])[None, :, None]))
    return np.stack([h.real, h.imag], axis=1).astype(np.float32)


def sample(tensor: np.ndarray) -> Sample:
    n = len(tensor)
    codes = {"site": np.repeat(np.arange(len(SITES)), ROWS), "source": np.zeros(n, np.int64), "band_ghz": np.zeros(n, np.int64)}
    names = {"site": list(SITES), "source": ["sionna"], "band_ghz": ["3.5"]}
    return Sample({"ls": tensor.reshape(n, -1)}, np.arange(n), np.arange(n), codes, names, np.full(n, -1), True)


@pytest.fixture
def tensor() -> np.ndarray:
    rng = np.random.default_rng(4)
    return np.concatenate([estimates(rng, los=name == "los") for name in SITES])


def test_a_line_of_sight_that_turns_one_way_is_no_other_order_of_real_and_imaginary_parts(tensor):
    assert component_order(sample(tensor), LS, SCHEMA) == []
    # The real numbers alone do look permuted, so that the case is a test of something.
    plain = ColumnSpec(name="ls", dtype="float32", axes=("part", "dmrs_symbol", "estimate"), shape=LS.shape)
    assert component_order(sample(tensor), plain, SCHEMA)


def test_estimates_of_one_site_in_another_order_are_found(tensor):
    order = np.random.default_rng(1).permutation(12)
    tensor[ROWS : 2 * ROWS] = tensor[ROWS : 2 * ROWS][..., order]
    (found,) = component_order(sample(tensor), LS, SCHEMA)
    assert found.fault == "component_order" and "site b" in found.where


@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_nearest_row_of_another_unit_is_the_nearest(n: int, per_unit: int, seed: int):
    rng = np.random.default_rng(seed)
    space = rng.normal(size=(n, 5)).astype(np.float32)
    unit = rng.permutation(np.arange(n) // per_unit)
    if len(np.unique(unit)) < 2:
        return
    near = _nearest_elsewhere(space, unit, rows_at_once=7)
    far = ((space[:, None] - space[None]) ** 2).sum(-1)
    far[unit[:, None] == unit] = np.inf
    assert (unit[near] != unit).all()
    np.testing.assert_allclose(far[np.arange(n), near], far.min(axis=1), rtol=1e-3, atol=1e-4)
