"""What telemetry rows are worth: the model's score and the classical method's on labelled rows, the promised one on all."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rankd_pipeline.drift.judge import Rows
from rankd_pipeline.ran_functions.contract import Predictor, RanFunction
from rankd_pipeline.runtime.bundle import Predictor as Bundle
from rankd_pipeline.training.seeds import derive_seed


class Evidence:
    """Turns columns into rows to be judged. model: recipe of the bundle under watch; None watches whichever decided."""

    def __init__(self, function: RanFunction, cfg: Any, model: str | None, seed: int = 0) -> None:
        self._function, self._cfg, self._head, self._model, self._seed = function, cfg, function.head(), model, seed
        self._classical: Predictor | None = None

    @property
    def has_classical(self) -> bool:
        return self._classical is not None

    def learn_classical(self, columns: Mapping[str, np.ndarray]) -> None:
        """Take the classical method that is best on these labelled rows, of those that need only what the model is given."""
        labelled = columns["has_label"]
        if not labelled.any():
            return
        given = {name: values[labelled] for name, values in columns.items()}
        data = self._function.with_labels(given, given["label"])
        rivals = [
            item.fit(data, data, derive_seed(self._seed, "baseline", item.name) % 2**32)
            for item in self._function.baselines(self._cfg)
            if not item.learned and item.gate and not item.needs_truth
        ]
        if rivals:
            self._classical = max(rivals, key=lambda rival: float(self._head.row_scores(rival(data), data["label"]).mean()))

    def decided_by(self, bundle: Bundle, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns as if this bundle had decided every row."""
        output = self._function.deployed_predictor(bundle, bundle.signature)(columns)
        model = np.full(len(output), bundle.manifest.about["recipe"], dtype=object)
        return {**columns, "output": output, "confidence": self._head.confidence(output), "model": model}

    def rows(self, columns: Mapping[str, np.ndarray]) -> Rows:
        """Columns with what their decisions were worth."""
        n, labelled = len(columns["time_s"]), columns["has_label"]
        score, baseline = np.full(n, np.nan), np.full(n, np.nan)
        if labelled.any():
            score[labelled] = self._head.row_scores(columns["output"][labelled], columns["label"][labelled])
            if self._classical is not None:
                data = {name: values[labelled] for name, values in columns.items()}
                baseline[labelled] = self._head.row_scores(self._classical(data), data["label"])
        own = np.asarray(columns["model"] == self._model) if self._model is not None else np.ones(n, bool)
        return Rows(columns, own, score, baseline, self._head.expected_scores(columns["output"]))
