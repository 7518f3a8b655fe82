"""Tunes a network's decision rule on validation: the price each user begins with, and which aim gives which mean BLER.

Prices come from logged slots, aims from the slot loop, where all candidates run side by side as users of their own. Axis
legend: N traces, G aims, n logged slots, M MCS indices.
"""

from collections.abc import Mapping

import numpy as np

from rankd_pipeline.ran_functions.link_adaptation.networks import (
    AVOID,
    LIKELY_LOST,
    LOWEST_LOG_PRICE,
    TARGETS,
    Deployable,
    LinkNetwork,
    aim_key,
    price_key,
    stepper,
)
from rankd_pipeline.ran_functions.link_adaptation.policies import Learned
from rankd_pipeline.ran_functions.link_adaptation.rollout import Traces, roll_out
from rankd_pipeline.ran_functions.link_adaptation.tables import EFFICIENCY

AIMS = (0.004, 0.01, 0.03, 0.06, 0.1, 0.14, 0.2, 0.3, 0.45)
SLOTS = 30_000
HALVINGS = 20
HIGHEST_PRICE = 1e3


def operating_points(
    network: LinkNetwork, temperature: float, traces: Traces, predicted_nM: np.ndarray, true_nM: np.ndarray
) -> dict[str, float]:
    """Aim and first price of each of TARGETS, as calibration parameters.

    A target that no aim reaches (at their best rate users lose fewer blocks) gets the last one.
    """
    some = np.linspace(0, len(predicted_nM) - 1, min(len(predicted_nM), SLOTS)).astype(int)
    prices = [first_price(predicted_nM[some], true_nM[some], aim) for aim in AIMS]
    bler = _rolled_bler(network, temperature, prices, traces)
    # More to lose is never less lost, but for luck.
    rising = np.log(np.maximum(np.maximum.accumulate(bler), 1e-6)) + 1e-9 * np.arange(len(AIMS))
    log_aims = np.interp(np.log(TARGETS), rising, np.log(AIMS))
    log_prices = np.interp(log_aims, np.log(AIMS), np.log(prices))
    points = zip(TARGETS, np.exp(log_aims).tolist(), np.exp(log_prices).tolist(), strict=True)
    return {key: value for target, aim, price in points for key, value in ((aim_key(target), aim), (price_key(target), price))}


def first_price(predicted_nM: np.ndarray, true_nM: np.ndarray, bler: float) -> float:
    """The lowest price whose choices have a mean true BLER of at most `bler` over logged slots."""
    low, high = LOWEST_LOG_PRICE, np.log(HIGHEST_PRICE)
    if _chosen_bler(predicted_nM, true_nM, np.exp(low)) <= bler:
        return float(np.exp(low))
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        if _chosen_bler(predicted_nM, true_nM, np.exp(middle)) > bler:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def _chosen_bler(predicted_nM: np.ndarray, true_nM: np.ndarray, price: float) -> float:
    """Mean true BLER of the choices that `networks.Deployable` makes at one price."""
    avoided = AVOID * np.maximum(predicted_nM - LIKELY_LOST, 0.0)
    choice = (EFFICIENCY * (1.0 / price - predicted_nM - avoided)).argmax(axis=1)
    return float(true_nM[np.arange(len(choice)), choice].mean(dtype=np.float64))


def _rolled_bler(network: LinkNetwork, temperature: float, prices: list[float], traces: Traces) -> np.ndarray:
    """Mean BLER [G] over all traces of each aim in the slot loop."""
    trial: Mapping[str, float] = {
        "temperature": temperature, **dict(zip(map(aim_key, AIMS), AIMS, strict=True)),
        **dict(zip(map(price_key, AIMS), prices, strict=True)),
    }  # fmt: skip
    policy = Learned(stepper(Deployable(network, trial, AIMS)), network.state_size + 1, np.repeat(AIMS, len(traces.cqi_NT)))
    rollout = roll_out(traces.repeated(len(AIMS)), policy)
    return 1.0 - rollout.ack_NT.reshape(len(AIMS), -1).mean(axis=1)
