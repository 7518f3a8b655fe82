"""What channel prediction has to beat: rules without a network, and two learned predictors of the literature.

    hold          the last visible instant (or subcarrier), kept
    ar            an autoregressive model fitted to each sample's own visible part by ridge least squares over all antennas
                  and subcarriers, forwards and (conjugated) backwards, then run on; order and ridge tuned on validation
    ar_cleaned    the same behind the sample's own Wiener filters against noise (`runs.cleaned`), noise power tuned on
                  validation: what an aligned network is before it has learned anything. A part of the networks, not a rival:
                  printed, so that one sees what is learned, and no gate
    wiener        the linear predictor of least mean square error along the axis, from the covariance that the set has in
                  training (the steady state of a Kalman filter for it); a set never seen takes the mean of all
    lstm          two layers over time (frequency), antennas and subcarriers flattened
    transformer   an encoder over time (frequency) with one token an instant (subcarrier)

Every predictor maps features to the hidden patches [n, M, E]. Shapes: n samples, S series, P visible and Q hidden places
along the axis of the task.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankd_pipeline.ran_functions.channel_prediction.alignment import aligned
from rankd_pipeline.ran_functions.channel_prediction.config import ELEMENTS, PATCH
from rankd_pipeline.ran_functions.channel_prediction.metrics import nmse_of_samples
from rankd_pipeline.ran_functions.channel_prediction.patches import (
    TASKS,
    TIME_KEPT,
    coordinates,
    hidden_patches,
    patchify,
    questions,
    unpatchify,
    visible_patches,
    wanted_patches,
)
from rankd_pipeline.ran_functions.contract import Arrays, Baseline, Predictor
from rankd_pipeline.settings import settings
from rankd_pipeline.training.fit import FitConfig, fit
from rankd_pipeline.training.parallel import map_processes
from rankd_pipeline.training.weights import load_weights, save_weights

Grid = tuple[int, int, int]
Series = Callable[[np.ndarray, int, str, Grid, np.ndarray], np.ndarray]
"""(visible [n, S, P], hidden places Q, task, grid, sites [n]) -> hidden [n, S, Q], complex."""

NOISES = (0.003, 0.01, 0.03)
ORDERS, RIDGES = (1, 2, 4, 6, 7, 10), (1e-4, 1e-3, 1e-2)
LEARNED_FIT = {"epochs": 6, "batch_size": 64, "lr": 2e-3, "warmup_share": 0.05, "validate_every": 2, "clip_norm": 1.0}
WEIGHTS = "weights.safetensors"


def all_baselines() -> tuple[Baseline, ...]:
    """Non-learned ones first."""
    return (
        Baseline("hold", False, lambda *_: along_axis(hold)),
        Baseline("ar", False, lambda train, val, seed: fit_ar(val)),
        Baseline("ar_cleaned", False, lambda train, val, seed: fit_ar_cleaned(val), gate=False),
        Baseline("wiener", False, lambda train, val, seed: fit_wiener(train)),
        Baseline("lstm", True, lambda train, val, seed: fit_sequence("lstm", train, val, seed)),
        Baseline("transformer", True, lambda train, val, seed: fit_sequence("transformer", train, val, seed)),
    )


def along_axis(predict: Series) -> Predictor:
    """A predictor of series along the axis of the task, as a predictor of hidden patches."""

    def run(features: Arrays) -> np.ndarray:
        csi, grids = features["csi"], features["grid"]
        sites = np.asarray(features["site"]).astype(str)
        found = np.zeros((len(csi), _most_hidden(grids, features["task"]), ELEMENTS), np.float32)
        for rows, grid, task in questions(grids, features["task"]):
            wanted = wanted_patches(grid, task)
            found[rows, : len(wanted)] = _hidden_of(predict, csi[rows], grid, task, sites[rows])[:, wanted]
        return found

    return run


def _most_hidden(grids: np.ndarray, tasks: np.ndarray) -> int:
    return max(len(wanted_patches(grid, task)) for _, grid, task in questions(grids, tasks))


def _hidden_of(predict: Series, csi: np.ndarray, grid: Grid, task: str, sites: np.ndarray) -> np.ndarray:
    """All patches [n, L, E] of which the hidden ones are predicted; the visible ones alone reach `predict`."""
    visible, hidden_places = as_series(csi, grid, task)
    hidden = predict(visible, hidden_places, task, grid, sites)
    whole = np.concatenate([visible, hidden], axis=-1)
    t, a, k = (PATCH * size for size in grid)
    if task == "time":
        return patchify(whole.reshape(len(csi), a, k, t).transpose(0, 3, 1, 2))
    return patchify(whole.reshape(len(csi), t, a, k))


def as_series(csi: np.ndarray, grid: Grid, task: str) -> tuple[np.ndarray, int]:
    """(visible part as complex series [n, S, P], number of hidden places) along the axis of the task."""
    seen = np.zeros_like(csi[:, : int(np.prod(grid))])
    at = visible_patches(grid, task)
    seen[:, at] = csi[:, at]
    series = _whole_series(seen, grid, task)
    kept = visible_places(series.shape[-1])
    return series[..., :kept], series.shape[-1] - kept


def visible_places(length: int) -> int:
    """Instants (subcarriers) of an axis that its task leaves visible: whole patches."""
    return PATCH * int(length // PATCH * TIME_KEPT)


def hold(visible: np.ndarray, hidden: int, task: str, grid: Grid, sites: np.ndarray) -> np.ndarray:
    """The last visible value of each series, repeated."""
    return np.repeat(visible[..., -1:], hidden, axis=-1)


def autoregressive(visible: np.ndarray, hidden: int, order: int, ridge: float) -> np.ndarray:
    """Run an AR(order) model on (of a lower order where there are too few places), fitted to each sample over all its series."""
    n, _, places = visible.shape
    order = min(order, places - 1)
    parts = []
    for way in (visible, visible[..., ::-1].conj()):
        windows = np.stack([way[..., i : places - order + i] for i in range(order)], axis=-1)  # [n, S, P - order, order]
        parts.append((windows.reshape(n, -1, order), way[..., order:].reshape(n, -1)))
    x, y = (np.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    gram = x.conj().transpose(0, 2, 1) @ x
    level = np.einsum("nii->n", gram).real / order
    gram += (ridge * level + 1e-12)[:, None, None] * np.eye(order)
    weights = np.linalg.solve(gram, x.conj().transpose(0, 2, 1) @ y[..., None])[..., 0]
    # An unstable fit must not run away: nothing larger than what was seen.
    bound = np.abs(visible).max(axis=(1, 2))[:, None]
    state, found = visible[..., places - order :], []
    for _ in range(hidden):
        following = np.einsum("nsi,ni->ns", state, weights)
        size = np.abs(following)
        following = following * np.minimum(1.0, bound / np.maximum(size, 1e-12))
        found.append(following)
        state = np.concatenate([state[..., 1:], following[..., None]], axis=-1)
    return np.stack(found, axis=-1)


def fit_ar(val: Arrays) -> Predictor:
    """Order and ridge of each task by the mean NMSE on validation."""
    chosen: dict[str, tuple[int, float]] = {}
    for task in TASKS:
        asked = {**val, "task": np.full(len(val["grid"]), task)}
        truth = hidden_patches(asked["csi"], asked["grid"], asked["task"])
        options = [(order, ridge) for order in ORDERS for ridge in RIDGES]
        scores = [
            nmse_of_samples(along_axis(lambda v, q, *_, o=order, r=ridge: autoregressive(v, q, o, r))(asked), truth).mean()
            for order, ridge in options
        ]
        chosen[task] = options[int(np.argmin(scores))]
    return along_axis(lambda visible, hidden, task, grid, sites: autoregressive(visible, hidden, *chosen[task]))


def fit_ar_cleaned(val: Arrays) -> Predictor:
    """Noise power by the mean NMSE over both tasks on validation."""
    asked = [{**val, "task": np.full(len(val["grid"]), task)} for task in TASKS]
    truths = [hidden_patches(part["csi"], part["grid"], part["task"]) for part in asked]
    scores = [
        np.mean([nmse_of_samples(ar_cleaned(part, noise), truth).mean() for part, truth in zip(asked, truths, strict=True)])
        for noise in NOISES
    ]
    noise = NOISES[int(np.argmin(scores))]
    return lambda features: ar_cleaned(features, noise)


def ar_cleaned(features: Arrays, noise: float) -> np.ndarray:
    """The hidden patches [n, M, E] as `alignment` continues the cleaned visible ones, without a network."""
    csi, grids = features["csi"], features["grid"]
    found = np.zeros((len(csi), _most_hidden(grids, features["task"]), ELEMENTS), np.float32)
    for rows, grid, task in questions(grids, features["task"]):
        at, seen, wanted = coordinates(grid), visible_patches(grid, task), wanted_patches(grid, task)
        for some in np.array_split(rows, max(1, len(rows) // 256)):
            visible_at, wanted_at = (torch.from_numpy(at[part]).float().expand(len(some), -1, -1) for part in (seen, wanted))
            own = aligned(torch.from_numpy(csi[some][:, seen]), visible_at, wanted_at, noise)
            found[some, : len(wanted)] = own.turn.back(own.run_BME).numpy()
    return found


def fit_wiener(train: Arrays) -> Predictor:
    """Weights [P, Q] for each (set, task, length) from the covariance of training; pooled ones for a set never seen."""
    sums: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = {}
    sites = np.asarray(train["site"]).astype(str)
    for task in TASKS:
        for rows, grid, _ in questions(train["grid"], np.full(len(sites), task)):
            whole = _whole_series(train["csi"][rows], grid, task)
            for site in np.unique(sites[rows]):
                mine = whole[sites[rows] == site]
                covariance = np.einsum("nsp,nsq->pq", mine.conj(), mine) / (mine.shape[0] * mine.shape[1])
                for name in (site, ""):
                    before = sums.get((name, task, whole.shape[-1]), (np.zeros_like(covariance), np.zeros(1)))
                    sums[name, task, whole.shape[-1]] = (before[0] + covariance, before[1] + 1)
    weights = {key: _wiener_weights(total / count, key[2]) for key, (total, count) in sums.items()}

    def predict(visible: np.ndarray, hidden: int, task: str, grid: Grid, sites: np.ndarray) -> np.ndarray:
        length = visible.shape[-1] + hidden
        found = np.empty((*visible.shape[:-1], hidden), np.complex64)
        for site in np.unique(sites):
            mine = sites == site
            of_set = weights.get((str(site), task, length), weights.get(("", task, length)))
            found[mine] = hold(visible[mine], hidden, task, grid, sites) if of_set is None else visible[mine] @ of_set
        return found

    return along_axis(predict)


def _wiener_weights(covariance: np.ndarray, length: int) -> np.ndarray:
    seen = visible_places(length)
    own, cross = covariance[:seen, :seen], covariance[:seen, seen:]
    return np.linalg.solve(own + 1e-4 * np.trace(own).real / seen * np.eye(seen), cross).astype(np.complex64)


def _whole_series(csi: np.ndarray, grid: Grid, task: str) -> np.ndarray:
    """The whole channel as complex series [n, S, P + Q] along the axis of the task."""
    h_nTNK = unpatchify(csi[:, : int(np.prod(grid))], grid)
    moved = h_nTNK.transpose(0, 2, 3, 1) if task == "time" else h_nTNK
    return moved.reshape(len(csi), -1, moved.shape[-1])


class SequenceNetwork(nn.Module):
    """Vectors along one axis in, the following ones out: an LSTM that runs on, or an encoder with one token a place."""

    def __init__(self, kind: str, size: int, visible: int, hidden: int, width: int = 128) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        self.out = nn.Linear(width, size)
        if kind == "lstm":
            self.core = nn.LSTM(size, width, num_layers=2, batch_first=True)
        else:
            self.into = nn.Linear(size, width)
            self.place = nn.Parameter(0.02 * torch.randn(visible + hidden, width))
            layer = nn.TransformerEncoderLayer(
                width, 8, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.core = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, seen_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, Q, D]; what is learned is the change against the last visible vector."""
        last = seen_BPD[:, -1:]
        if self.kind == "lstm":
            hidden, state = self.core(seen_BPD)
            step, found = last + self.out(hidden[:, -1:]), []
            for _ in range(self.hidden):
                found.append(step)
                hidden, state = self.core(step, state)
                step = step + self.out(hidden)
            return torch.cat(found, dim=1)
        tokens = torch.cat([self.into(seen_BPD), self.place.new_zeros(len(seen_BPD), self.hidden, self.place.shape[1])], dim=1)
        return last + self.out(self.core(tokens + self.place)[:, seen_BPD.shape[1] :])


def fit_sequence(kind: str, train: Arrays, val: Arrays, seed: int) -> Predictor:
    """One network a grid and task (the flattened size differs), the best of its validations; trained side by side."""
    jobs: dict[tuple[Grid, str], dict[str, Any]] = {}
    with TemporaryDirectory(prefix="rankd-baseline-") as work:
        for task in TASKS:
            for rows, grid, _ in questions(train["grid"], np.full(len(train["grid"]), task)):
                others = np.flatnonzero((np.asarray(val["grid"]) == grid).all(axis=1))
                folder = Path(work) / str(len(jobs))
                folder.mkdir()
                for name, csi in (("train", train["csi"][rows]), ("val", val["csi"][others])):
                    np.save(folder / f"{name}.npy", _vectors(_whole_series(csi, grid, task)), allow_pickle=False)
                jobs[grid, task] = {"kind": kind, "seed": seed, "fit": LEARNED_FIT, "folder": str(folder)}
        map_processes(sequence_job, list(jobs.values()), settings().workers)
        networks = {question: load_sequence(job) for question, job in jobs.items()}

    def predict(visible: np.ndarray, hidden: int, task: str, grid: Grid, sites: np.ndarray) -> np.ndarray:
        network = networks.get((grid, task))
        if network is None:
            return hold(visible, hidden, task, grid, sites)
        with torch.no_grad():
            out = network(torch.from_numpy(_vectors(visible))).numpy()
        return _series(out, visible.shape[1])

    return along_axis(predict)


def sequence_job(job: Mapping[str, Any]) -> None:
    """Train one network on `train.npy` and `val.npy` (real vectors [n, P + Q, D]) of its folder; `weights` appear there."""
    folder = Path(job["folder"])
    torch.manual_seed(job["seed"])
    network, seen = _untrained(job)
    train, val = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("train", "val"))
    held = torch.from_numpy(val)

    def loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        wanted = batch["vectors"][:, seen:]
        error = (module(batch["vectors"][:, :seen]) - wanted).square().flatten(1).sum(dim=1)
        return (error / wanted.square().flatten(1).sum(dim=1)).mean()

    config = FitConfig.model_validate(job["fit"])
    fit(network, {"vectors": train}, loss, lambda module: float(loss(module, {"vectors": held})), config, job["seed"], folder)
    save_weights(network, folder / WEIGHTS)


def load_sequence(job: Mapping[str, Any]) -> nn.Module:
    """The network of a finished job."""
    network, _ = _untrained(job)
    load_weights(network, Path(job["folder"]) / WEIGHTS)
    return network.eval()


def _untrained(job: Mapping[str, Any]) -> tuple["SequenceNetwork", int]:
    """(network for the vectors of a job's folder, its visible places)."""
    _, length, size = np.load(Path(job["folder"]) / "train.npy", mmap_mode="r", allow_pickle=False).shape
    seen = visible_places(length)
    return SequenceNetwork(job["kind"], size, seen, length - seen), seen


def _vectors(series_nSP: np.ndarray) -> np.ndarray:
    """Complex series [n, S, P] as real vectors [n, P, 2 S]."""
    moved = series_nSP.transpose(0, 2, 1)
    return np.concatenate([np.real(moved), np.imag(moved)], axis=-1).astype(np.float32)


def _series(vectors_nPD: np.ndarray, series: int) -> np.ndarray:
    """The inverse of `_vectors`."""
    return (vectors_nPD[..., :series] + 1j * vectors_nPD[..., series:]).transpose(0, 2, 1)
