"""The baselines on cases whose answer is known: a single path, a known best beam, nothing reported, reports to learn from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.radio.codebooks import dft_codebook, wide_beams
from rankd_pipeline.ran_functions.beam_management import baselines
from rankd_pipeline.ran_functions.beam_management.config import BeamCorpusConfig

CFG = BeamCorpusConfig()
EVERY = {b.name: b for b in baselines.all_baselines(CFG)}
GRIDS = st.sampled_from([((4, 16), (2, 8)), ((2, 8), (1, 4)), ((4, 4), (2, 2)), ((1, 8), (1, 4)), ((4, 16), (4, 16))])
Columns = dict[str, np.ndarray]


def config(grid: tuple[tuple[int, int], tuple[int, int]]) -> BeamCorpusConfig:
    (rows, cols), (sub_rows, sub_cols) = grid
    return BeamCorpusConfig(array={"rows": rows, "cols": cols}, set_b={"rows": sub_rows, "cols": sub_cols})


def single_paths(v: np.ndarray, h: np.ndarray, cfg: BeamCorpusConfig, noise_db: float = 0.0, seed: int = 0) -> Columns:
    """Reports of plane waves with spatial frequencies v (downwards) and h in cycles per element, and their best narrow beam."""
    a, b = cfg.array, cfg.set_b
    phase = v[:, None, None] * np.arange(a.rows)[None, None, :] + h[:, None, None] * np.arange(a.cols)[None, :, None]
    wave = np.exp(2j * np.pi * phase).reshape(len(v), -1)
    power = np.abs(wave @ wide_beams(a.rows, a.cols, b.rows, b.cols).T) ** 2
    level = 10 * np.log10(np.maximum(power, 1e-4)) - 90 + noise_db * np.random.default_rng(seed).standard_normal(power.shape)
    label = (np.abs(wave @ dft_codebook(a.rows, a.cols).T) ** 2).argmax(1)
    return {
        "l1_rsrp_dbm": level[:, None].astype(np.float32), "l1_rsrp_mask": np.ones_like(level[:, None], np.uint8),
        "label": label, "hierarchical_beam": label.astype(np.int16), "dedicated_beam": label.astype(np.int16),
    }  # fmt: skip


def users(n: int, seed: int, noise_db: float = 1.0) -> Columns:
    """Single paths from anywhere in azimuth, level or from below."""
    rng = np.random.default_rng(seed)
    return single_paths(rng.uniform(-0.1, 0.35, n), rng.uniform(-0.5, 0.5, n), CFG, noise_db, seed)


def nothing(n: int = 3) -> Columns:
    columns = users(n, 0)
    return columns | {name: np.zeros_like(columns[name]) for name in ("l1_rsrp_dbm", "l1_rsrp_mask")}


def top1(scores: np.ndarray, columns: Columns) -> float:
    assert scores.shape == (len(columns["label"]), CFG.n_set_a) and np.isfinite(scores).all()
    return float((scores.argmax(1) == columns["label"]).mean())


def same_direction(found: np.ndarray, wanted: np.ndarray, period: int, wide: int) -> bool:
    """Whether the indices agree as far as the powers of `wide` beams on that axis can tell: one beam tells nothing, two see
    a direction and its mirror image alike (|1 + exp(jx)|^2 and |1 - exp(jx)|^2 are even in x)."""
    mirrored = ((found + wanted) % period == 0) & (wide == 2)
    return bool(np.all((wide == 1) | (found == wanted) | mirrored))


@given(GRIDS)
@settings(max_examples=10)
def test_interpolation_finds_a_single_path(grid):
    """In the direction of every narrow beam, also between two wide ones, where the best wide beam alone misses it."""
    cfg = config(grid)
    rows, cols = np.divmod(np.arange(cfg.n_set_a), cfg.array.cols)
    reports = single_paths(rows / cfg.array.rows, cols / cfg.array.cols, cfg)
    found_rows, found_cols = np.divmod(baselines.interpolation(reports, cfg).argmax(1), cfg.array.cols)
    assert same_direction(found_rows, rows, cfg.array.rows, cfg.set_b.rows)
    assert same_direction(found_cols, cols, cfg.array.cols, cfg.set_b.cols)
    if cfg.set_b.cols < cfg.array.cols:
        assert (baselines.best_of_set_b(reports, cfg).argmax(1) % cfg.array.cols != cols).mean() >= 0.4


def test_interpolation_looks_down_where_two_wide_rows_cannot_tell():
    """Row 1 (below the horizon, where users are) and row 3 match alike; which one wins is no matter of rounding."""
    h = np.linspace(-0.5, 0.5, 200)
    reports = single_paths(np.full(200, 0.25), h, CFG)
    assert set(baselines.interpolation(reports, CFG).argmax(1) // 16) == {1}


def test_interpolation_does_not_depend_on_the_level_and_survives_missing_beams():
    columns = users(200, 1, noise_db=0.0)
    scores = baselines.interpolation(columns, CFG)
    louder = baselines.interpolation(columns | {"l1_rsrp_dbm": columns["l1_rsrp_dbm"] + 25}, CFG)
    assert (scores.argmax(1) == louder.argmax(1)).mean() > 0.99
    level = columns["l1_rsrp_dbm"]
    strong = level >= np.sort(level, axis=-1)[..., -4:-3]
    four = columns | {"l1_rsrp_dbm": np.where(strong, level, 0), "l1_rsrp_mask": strong.astype(np.uint8)}
    by_rule = top1(baselines.best_of_set_b(columns, CFG), columns)
    assert top1(scores, columns) > by_rule + 0.4 and top1(baselines.interpolation(four, CFG), columns) > by_rule + 0.3


@given(GRIDS)
@settings(max_examples=10)
def test_best_of_set_b_is_the_narrow_beam_in_the_reported_direction(grid):
    cfg = config(grid)
    level = np.where(np.eye(cfg.n_set_b), -70, -90)[:, None].astype(np.float32)
    scores = baselines.best_of_set_b({"l1_rsrp_dbm": level, "l1_rsrp_mask": np.ones_like(level, np.uint8)}, cfg)
    v, h = np.divmod(np.arange(cfg.n_set_b), cfg.set_b.cols)
    step_v, step_h = cfg.array.rows // cfg.set_b.rows, cfg.array.cols // cfg.set_b.cols
    assert np.array_equal(scores.argmax(1), v * step_v * cfg.array.cols + h * step_h)


def test_beams_are_neighbours_around_the_circle():
    level = np.where(np.arange(16) == 0, -70, -90)[None, None].astype(np.float32)
    scores = baselines.best_of_set_b({"l1_rsrp_dbm": level, "l1_rsrp_mask": np.ones_like(level, np.uint8)}, CFG)
    assert set(np.argsort(-scores[0])[1:3]) == {1, 15}


def test_a_beam_that_was_not_reported_does_not_count():
    """The value under a zero mask is 0, which would be the strongest by far."""
    reports = nothing(1)
    reports["l1_rsrp_dbm"][0, 0, 5], reports["l1_rsrp_mask"][0, 0, 5] = -110, 1
    assert baselines.best_of_set_b(reports, CFG).argmax() == baselines.interpolation(reports, CFG).argmax() == 10


def test_hierarchical_measures_the_four_around_the_best_wide_beam():
    """Its Top-4 are the pointed-at beam, both neighbours in azimuth and one in elevation, best match first."""
    reports = users(100, 2)
    wide = reports["l1_rsrp_dbm"][:, 0].argmax(1)
    top4 = np.argsort(-baselines.hierarchical(reports, CFG), axis=1)[:, :4]
    for beam, four in zip(wide, top4, strict=True):
        row, col = beam // 8 * 2, beam % 8 * 2
        offsets = {((b // 16 - row + 2) % 4 - 2, (b % 16 - col + 8) % 16 - 8) for b in four}
        assert {(0, 0), (0, 1), (0, -1)} < offsets and all(abs(v) + abs(h) <= 1 for v, h in offsets)
    match = np.take_along_axis(baselines.interpolation(reports, CFG), top4, 1)
    assert np.all(match[:, 0] >= match.max(1) - 1e-3)


def test_non_learned_ones_come_first_and_some_gate():
    learned = [b.learned for b in EVERY.values()]
    assert learned == sorted(learned) and {n for n, b in EVERY.items() if b.learned} == {"knn", "boosted_trees"}
    assert {"best_of_set_b", "interpolation", "hierarchical"} <= {n for n, b in EVERY.items() if b.gate and not b.learned}
    # A sweep of its own is measured in the field, not computed; the one that costs more measurements sets no gate.
    measured = {n: (b.needs_truth, b.gate) for n, b in EVERY.items() if b.needs_truth}
    assert measured == {"hierarchical_sweep": (("hierarchical_beam",), True), "dedicated_sweep": (("dedicated_beam",), False)}


def test_a_measured_sweep_ranks_its_beam_first():
    swept = np.random.default_rng(0).integers(0, 64, 30).astype(np.int16)
    for sweep in (b for b in EVERY.values() if b.needs_truth):
        (column,) = sweep.needs_truth
        assert np.array_equal(sweep.fit({}, {}, 0)(users(30, 1) | {column: swept}).argmax(1), swept)


@pytest.fixture(scope="module")
def predictors() -> dict:
    """Every baseline, fitted where it learns."""
    train, val = users(500, 2), users(150, 3)
    return {name: b.fit(train, val, 0) for name, b in EVERY.items()}


@pytest.mark.parametrize("name", ["knn", "boosted_trees"])
def test_learned_baselines_learn(name, predictors):
    test = users(300, 4)
    assert top1(predictors[name](test), test) > top1(predictors["best_of_set_b"](test), test) + 0.1


@pytest.mark.parametrize("name", ["knn", "boosted_trees"])
def test_learned_baselines_follow_their_seed_and_put_classes_never_seen_last(name):
    train, val = users(150, 5), users(60, 6)
    train = {column: values[train["label"] % 16 < 3] for column, values in train.items()}
    first, second = (EVERY[name].fit(train, val, 7)(val) for _ in range(2))
    assert np.array_equal(first, second)
    seen = np.isin(np.arange(64), train["label"])
    assert np.all(first[:, ~seen].max(1) <= first[:, seen].max(1)) and np.all(seen[first.argmax(1)])


def test_neighbours_are_chosen_on_validation():
    """Half the training labels are wrong: five neighbours are misled, so validation picks more."""
    train, val, test = users(600, 8), users(300, 9), users(200, 10)
    rng = np.random.default_rng(1)
    train["label"] = np.where(rng.random(600) < 0.5, rng.integers(0, 64, 600), train["label"])
    scores = EVERY["knn"].fit(train, val, 0)(test)
    assert (scores > 0).sum(1).max() > 5 and top1(scores, test) > 0.4


@pytest.mark.parametrize("name", list(EVERY))
def test_nothing_reported_gives_a_finite_ranking(name, predictors):
    top1(predictors[name](nothing()), nothing())


@pytest.mark.parametrize("name", list(EVERY))
def test_only_the_newest_report_counts(name, predictors):
    now = users(20, 11)
    history = now | {c: np.concatenate([np.zeros_like(now[c])] * 2 + [now[c]], axis=1) for c in ("l1_rsrp_dbm", "l1_rsrp_mask")}
    assert np.array_equal(predictors[name](history), predictors[name](now))
