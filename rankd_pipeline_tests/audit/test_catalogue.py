"""The audit against planted faults and clean corpora, on drops of the real simulator (the full table is a benchmark)."""

from collections.abc import Callable

import numpy as np
import pytest

from rankd_pipeline.audit.faults import CATALOGUE, Corpus, recall_table, run_catalogue
from rankd_pipeline.audit.report import AuditConfig

# What compares rows is slow, so each kind is audited with the comparison that must find it; benchmarks/audit_catalogue.py
# plants every kind against the whole audit.
COMPARISON = {
    "stuck_component": "components", "components_permuted": "components", "receiver_off": "runs", "dbw_for_dbm": "levels",
    "units_leaked_with_noise": "copies", "labels_random": "labels", "labels_of_other_rows": "labels", "labels_off_by_one": "labels",
}  # fmt: skip
COUNTED = [name for name in CATALOGUE if name not in COMPARISON]


def test_clean_corpora_raise_no_alarm(make_clean: Callable[[int], Corpus]) -> None:
    trials = run_catalogue(make_clean, (), range(1000, 1020), ())
    assert len(trials) == 20
    assert trials["findings"].tolist() == [""] * 20


def test_counted_faults_are_all_found(make_clean: Callable[[int], Corpus]) -> None:
    trials = run_catalogue(make_clean, range(20), (), COUNTED, AuditConfig(comparisons=()))
    table = recall_table(trials)
    assert len(table) >= 12
    assert (table["trials"] == 20).all()
    assert table["named"].min() >= 0.95, trials[~trials["named"]].to_string()


@pytest.mark.parametrize(("fault", "seeds", "least"), [
    ("stuck_component", 20, 0.85), ("components_permuted", 20, 0.9), ("receiver_off", 20, 0.9),
    ("units_leaked_with_noise", 20, 0.7), ("dbw_for_dbm", 20, 0.8),
    ("labels_random", 5, 0.8), ("labels_of_other_rows", 5, 0.8), ("labels_off_by_one", 5, 0.8),
])  # fmt: skip
def test_faults_that_only_a_comparison_shows(make_clean: Callable[[int], Corpus], fault: str, seeds: int, least: float) -> None:
    cfg = AuditConfig(comparisons=(COMPARISON[fault],))
    trials = run_catalogue(make_clean, range(seeds), (), [fault], cfg)
    assert trials["named"].mean() >= least, trials.to_string()


def test_more_severe_noise_is_estimated_higher(make_clean: Callable[[int], Corpus]) -> None:
    cfg = AuditConfig(comparisons=("labels",))
    clean = make_clean(3)
    shares = []
    for severity in (0.0, 1.0):  # 5 % and 20 %
        report = CATALOGUE["labels_random"].plant(clean, np.random.default_rng(5), severity).audit(cfg)
        assert report.label_noise is not None
        shares.append(report.label_noise["share"])
        assert report.label_noise["low"] <= shares[-1] <= report.label_noise["high"]
    assert 0.03 < shares[0] < 0.09
    assert 0.13 < shares[1] < 0.27
