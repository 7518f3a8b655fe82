"""Reads channels from HDF5 files (MATLAB 7.3 .mat) in WiFo's layout: complex [samples, T, N, K] under one key.

The published files cross their names: the array inside X_test.mat is called X_val. MATLAB writes the axes of an array in
reverse order, and complex numbers as pairs (real, imag); files that Python wrote may do neither.
"""

from pathlib import Path

import h5py
import numpy as np

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_prediction.config import ChannelSet

POWER_SAMPLES = 512


class ChannelFile:
    """An open file of one set's channels; reads slices of samples, so memory does not grow with the file.

    Raises: RankdError naming file, key, what was found and what was expected.
    """

    def __init__(self, path: Path, key: str, full: ChannelSet, used: ChannelSet) -> None:
        """full: the set as the file holds it; used: the same, cropped."""
        if not path.is_file():
            raise RankdError(f"set {full.name}: {path} is no file; put the .mat under the rankd home or correct sets.file.")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise RankdError(
                f"set {full.name}: {path} is no HDF5 file ({error}); .mat files older than version 7.3 must be saved with -v7.3."
            ) from None
        found = self._file.get(key)
        if not isinstance(found, h5py.Dataset):
            raise RankdError(f"set {full.name}: {path} has no array {key!r}; it holds {', '.join(self._file)}. Set sets.key.")
        self._data, self.path, self.set = found, path, used
        wanted = (full.instants, full.antennas, full.subcarriers)
        if found.ndim == 4 and found.shape[1:] == wanted and "MATLAB_class" not in found.attrs:
            self._reversed = False
        elif found.ndim == 4 and found.shape[:3] == wanted[::-1]:
            self._reversed = True
        elif found.ndim == 4 and found.shape[1:] == wanted:
            self._reversed = False
        else:
            raise RankdError(
                f"set {full.name}: {path}, {key}: shape {found.shape}; expected [samples, {', '.join(map(str, wanted))}] "
                "(instants, antennas, subcarriers) or the reverse. Describe another grid under sets.own."
            )

    def __len__(self) -> int:
        return self._data.shape[-1 if self._reversed else 0]

    def __enter__(self) -> "ChannelFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, count: int) -> np.ndarray:
        """Samples start … start + count: complex64 [count, T, N, K], cropped, of the power that the file has."""
        rows = slice(start, start + count)
        raw = self._data[..., rows] if self._reversed else self._data[rows]
        if raw.dtype.names:
            first, second = raw.dtype.names
            raw = raw[first] + 1j * raw[second]
        h = raw.transpose(3, 2, 1, 0) if self._reversed else raw
        item = self.set
        h = h[:, : item.instants, : item.antennas, : item.subcarriers].astype(np.complex64)
        if not np.isfinite(h).all():
            bad = int(np.flatnonzero(~np.isfinite(h).reshape(len(h), -1).all(axis=1))[0]) + start
            raise RankdError(f"set {item.name}: {self.path}: sample {bad} holds NaN or infinity; remove it from the file.")
        return h

    def scale(self) -> float:
        """What brings the set to unit mean power: one number for all samples, from the first of them."""
        power = float(np.mean(np.abs(self.read(0, min(POWER_SAMPLES, len(self)))) ** 2))
        if power <= 0:
            raise RankdError(f"set {self.set.name}: {self.path} holds only zeros.")
        return power**-0.5
