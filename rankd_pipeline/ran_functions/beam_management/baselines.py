"""What beam management has to beat: classical rules that a base station runs today, and tuned learners.

Every predictor returns scores [n, n_set_a], larger is better, so that Top-1, Top-4 and the RSRP loss can be read off
any of them. Axis legend: B wide beams (Set B), N narrow beams (Set A), n samples. Only the newest report is used.

Measurement overhead. Set B is broadcast: one sweep of it serves every user of the cell. `best_of_set_b` and
`interpolation` spend nothing more. `hierarchical` then measures, for each user, the four narrow beams around its best wide
beam: its Top-4 are those four, to be held against the four beams that a network would have measured. The
`hierarchical_sweep` spends as many beams as Set B has, on all users of a drop together: 8 broadcast parents and 8 narrow
beams that the users share (column `hierarchical_beam`, measured with noise). With 8 narrow beams for each user alone a
sweep finds the best beam more often than any network that sees Set B only (truth column `dedicated_beam`), but costs
8 + 80 beams for the ten users of a drop: another overhead, not compared here.
"""

import numpy as np

from rankd_pipeline.radio import codebooks
from rankd_pipeline.ran_functions.beam_management.config import BeamCorpusConfig
from rankd_pipeline.ran_functions.contract import Arrays, Baseline, Predictor

# Reports are compressed to amplitude^(2 * POWER) before they are matched with the beam patterns. Chosen on the
# training split among 0.5 to 1: it weighs side lobes between dB (too loud) and watt (too quiet).
POWER = 0.6


def all_baselines(cfg: BeamCorpusConfig) -> tuple[Baseline, ...]:
    """Non-learned ones first; see the module's text for what each may measure."""
    return (
        Baseline("best_of_set_b", False, lambda *_: lambda features: best_of_set_b(features, cfg)),
        Baseline("interpolation", False, lambda *_: lambda features: interpolation(features, cfg)),
        Baseline("hierarchical", False, lambda *_: lambda features: hierarchical(features, cfg)),
        Baseline("hierarchical_sweep", False, lambda *_: lambda features: measured_sweep(features, cfg),
                 ("hierarchical_beam",)),
        Baseline("dedicated_sweep", False, lambda *_: lambda features: measured_sweep(features, cfg, "dedicated_beam"),
                 ("dedicated_beam",), gate=False),
        Baseline("knn", True, lambda train, val, seed: fit_knn(train, val, cfg)),
        Baseline("boosted_trees", True, lambda train, val, seed: fit_boosted_trees(train, val, seed, cfg)),
    )  # fmt: skip


def best_of_set_b(features: Arrays, cfg: BeamCorpusConfig) -> np.ndarray:
    """The narrow beam that points where the strongest reported wide beam does; the rest by their distance from it."""
    wide = _newest(features, cfg).argmax(axis=1)
    v, h = np.divmod(wide, cfg.set_b.cols)
    rows, cols = np.divmod(np.arange(cfg.n_set_a), cfg.array.cols)
    step_v, step_h = cfg.array.rows // cfg.set_b.rows, cfg.array.cols // cfg.set_b.cols
    dv = _wrapped(rows[None] - v[:, None] * step_v, cfg.array.rows)
    dh = _wrapped(cols[None] - h[:, None] * step_h, cfg.array.cols)
    # Azimuth before elevation among equals: users are spread in azimuth.
    return (-(dv**2 + dh**2) - 0.01 * np.abs(dv)).astype(np.float32)


def interpolation(features: Arrays, cfg: BeamCorpusConfig) -> np.ndarray:
    """All wide reports at once: how well their pattern matches a single path in each narrow beam's direction."""
    level = _newest(features, cfg)
    strongest = level.max(axis=1, keepdims=True)
    power = np.where(np.isfinite(level), 10 ** ((level - np.where(np.isfinite(strongest), strongest, 0)) / 10), 0.0)
    dictionary = _patterns(cfg) ** POWER
    dictionary /= np.linalg.norm(dictionary, axis=0, keepdims=True)
    match = power**POWER @ dictionary
    # A path above or below the horizon matches alike (two wide rows cannot tell): users are below, and it must not be the
    # rounding of the last bit that decides. Among what is left, the nearest to the best wide beam wins.
    above = np.arange(cfg.n_set_a) // cfg.array.cols > cfg.array.rows // 2
    return (match - 1e-5 * above + 1e-6 * best_of_set_b(features, cfg)).astype(np.float32)


def hierarchical(features: Arrays, cfg: BeamCorpusConfig) -> np.ndarray:
    """Best wide beam first, then its four nearest narrow beams are measured: those are its Top-4, best match first."""
    around = best_of_set_b(features, cfg)
    chosen = np.argsort(-around, axis=1, kind="stable")[:, :4]
    scores = interpolation(features, cfg) - 1e3
    np.put_along_axis(scores, chosen, np.take_along_axis(scores, chosen, axis=1) + 1e3, axis=1)
    return scores


def measured_sweep(features: Arrays, cfg: BeamCorpusConfig, column: str = "hierarchical_beam") -> np.ndarray:
    """The beam that a two-stage sweep has found by its own noisy measurements (`column`), then the best pattern matches."""
    scores = interpolation(features, cfg)
    scores[np.arange(len(scores)), np.asarray(features[column], np.int64)] += 1e3
    return scores


def fit_knn(train: Arrays, val: Arrays, cfg: BeamCorpusConfig) -> Predictor:
    """Nearest reports on file (RSRP fingerprint), weighted by distance; the number of neighbours is tuned on validation."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors().fit(_fingerprint(train, cfg))
    label = np.asarray(train["label"], np.int64)

    def predictor(neighbours: int) -> Predictor:
        def predict(features: Arrays) -> np.ndarray:
            distance, at = index.kneighbors(_fingerprint(features, cfg), min(neighbours, len(label)))
            scores = np.zeros((len(at), cfg.n_set_a), np.float32)
            rows = np.repeat(np.arange(len(at)), at.shape[1])
            np.add.at(scores, (rows, label[at].ravel()), (1.0 / (distance + 0.1)).ravel().astype(np.float32))
            return scores

        return predict

    candidates = [predictor(neighbours) for neighbours in (5, 10, 20, 40, 80)]
    return max(candidates, key=lambda candidate: _top1(candidate, val))


def fit_boosted_trees(train: Arrays, val: Arrays, seed: int, cfg: BeamCorpusConfig) -> Predictor:
    """Gradient-boosted trees on the reports, one score a narrow beam; depth and rate are tuned on validation."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    label = np.asarray(train["label"], np.int64)
    candidates = []
    for leaves, rate in ((8, 0.1), (16, 0.1)):
        model = HistGradientBoostingClassifier(
            learning_rate=rate, max_leaf_nodes=leaves, max_iter=25, min_samples_leaf=10, l2_regularization=1.0, max_bins=64,
            early_stopping=False,  # type: ignore[arg-type]  (scikit-learn takes a bool; its stub says str)
            random_state=seed,
        )  # fmt: skip
        model.fit(_fingerprint(train, cfg), label)

        def predict(features: Arrays, model: HistGradientBoostingClassifier = model) -> np.ndarray:
            scores = np.full((len(features["l1_rsrp_dbm"]), cfg.n_set_a), -1e3, np.float32)
            scores[:, np.asarray(model.classes_, np.int64)] = model.predict_proba(_fingerprint(features, cfg))
            return scores

        candidates.append(predict)
    return max(candidates, key=lambda candidate: _top1(candidate, val))


def _top1(predict: Predictor, val: Arrays) -> float:
    return float(np.mean(predict(val).argmax(axis=1) == val["label"]))


def _newest(features: Arrays, cfg: BeamCorpusConfig) -> np.ndarray:
    """The newest report [n, B], dBm; −inf where nothing was reported."""
    return np.where(np.asarray(features["l1_rsrp_mask"])[:, -1] > 0, np.asarray(features["l1_rsrp_dbm"])[:, -1], -np.inf)


def _fingerprint(features: Arrays, cfg: BeamCorpusConfig) -> np.ndarray:
    """Each wide beam relative to the strongest (dB, −30 where missing) and the strongest itself, scaled alike."""
    level = _newest(features, cfg)
    strongest = level.max(axis=1, keepdims=True)
    strongest = np.where(np.isfinite(strongest), strongest, -140.0)
    relative = np.maximum(np.where(np.isfinite(level), level - strongest, -30.0), -30.0)
    return np.concatenate([relative, (strongest + 90.0) / 4.0], axis=1)


def _wrapped(difference: np.ndarray, period: int) -> np.ndarray:
    """Distance on the circle of DFT beams: the last one is the neighbour of the first."""
    return (difference + period // 2) % period - period // 2


def _patterns(cfg: BeamCorpusConfig) -> np.ndarray:
    """Power gain [B, N] of each wide beam for a single path in each narrow beam's direction."""
    narrow = codebooks.dft_codebook(cfg.array.rows, cfg.array.cols)
    wide = codebooks.wide_beams(cfg.array.rows, cfg.array.cols, cfg.set_b.rows, cfg.set_b.cols)
    return np.maximum(np.abs(wide @ narrow.conj().T) ** 2, 1e-9)
