"""The head of link adaptation: the BLER of each MCS as independent events, with a decision rule that is still to be tuned."""

import numpy as np

from rankd_pipeline.distillation.heads import Calibration, EventsHead
from rankd_pipeline.ran_functions.link_adaptation.networks import TARGETS, aim_key, price_key

FIRST_PRICE = 1.5
UNKNOWN = 0.5
"""Label of an MCS of which an ACK or a NACK says nothing."""
UNTUNED = {**{aim_key(target): target for target in TARGETS}, **{price_key(target): FIRST_PRICE for target in TARGETS}}


class BlerHead(EventsHead):
    """Events whose calibration also holds the operating points of the decision rule (see `operating`), untuned at first."""

    neutral: Calibration | None = {"temperature": 1.0, **UNTUNED}

    def row_scores(self, delivered: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """1 minus the mean squared error (Brier) over the MCS of which the label says something: HARQ leaves the rest at 0.5."""
        known = labels != UNKNOWN
        error = np.where(known, (delivered.astype(np.float64) - labels) ** 2, 0.0).reshape(len(labels), -1).sum(axis=1)
        return 1.0 - error / np.maximum(known.reshape(len(labels), -1).sum(axis=1), 1)

    def fit_calibration(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {**super().fit_calibration(outputs, labels), **UNTUNED}
