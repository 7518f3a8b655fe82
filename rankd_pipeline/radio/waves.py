"""What every carrier has in common: the speed of light and the Doppler shift."""

import numpy as np

LIGHT_MPS = 299_792_458.0


def max_doppler_hz(speed_kmh: np.ndarray | float, ghz: np.ndarray | float) -> np.ndarray:
    """Largest Doppler shift of a user at this speed, float64 of the broadcast shape of both."""
    return np.asarray(speed_kmh, np.float64) / 3.6 * ghz * 1e9 / LIGHT_MPS
