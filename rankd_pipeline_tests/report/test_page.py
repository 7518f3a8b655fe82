"""The pages: self-contained, escaped, well formed, and with every number that they were given."""

import base64
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from rankd_pipeline.audit.report import AuditConfig, AuditReport, CardRow, Finding
from rankd_pipeline.audit.schema import SourceInfo
from rankd_pipeline.report.figures import training_curve
from rankd_pipeline.report.page import render_audit, render_model_card, render_report
from rankd_pipeline.report.scorecard import check_targets, scorecard_json
from rankd_pipeline.runtime.signature import ModelSignature, TensorSpec
from rankd_pipeline_tests.report.test_scorecard import SECONDS, STEPS, TOP1

HOSTILE = "<script>alert(1)</script> & 'more'"
GATE = {
    "name": "gap_site",
    "metric": "top1",
    "value": 0.041,
    "ci95": [0.035, 0.047],
    "comparator": "<",
    "threshold": 0.03,
    "unit": "share",
    "verdict": "fail",
    "resolved": {"best_baseline@test": "hierarchical@test", "teacher@test": "teacher@test"},
    "n_units": 200,
    "next_step": "More sites.",
}
VOID = {"meta", "img", "line", "rect", "circle"}


class Checker(HTMLParser):
    """Raises on tags that do not nest; collects text and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object", "form"), tag
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "background")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html: str) -> str:
    """The page's text; asserts that it is well formed and loads nothing from outside."""
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and all(link.startswith("data:image/png;base64,") for link in checker.links)
    assert not re.search(r"url\(|@import", html)
    return " ".join(" ".join(checker.text).split())


@pytest.fixture
def card():
    return scorecard_json("beam_management", "laptop", TOP1, STEPS, SECONDS)


@pytest.fixture(scope="module")
def picture():
    return training_curve([{"epoch": e, "train_loss": 1 / e, "validation": None} for e in range(1, 5)])


def test_the_report_shows_everything_it_was_given(card, picture):
    tables = {"Per site": pd.DataFrame({"site": ["umi_0", HOSTILE], "top1": [0.51234, None], "n": [5000, 12]})}
    html = render_report(card, {"training_curve": picture, "My own caption": picture}, tables, ["KD not useful", HOSTILE], [GATE],
                         check_targets(card))  # fmt: skip
    text = checked(html)
    assert html.count(base64.b64encode(picture).decode()) == 2 and "My own caption" in text
    for part in (
        "70.0 %",
        "[68.0, 72.0]",
        "MISS",
        "0.03 share",
        "More sites.",
        "best_baseline@test = hierarchical@test",
        "KD not useful",
        "Per site",
        "0.5123",
        "5,000",
        "–",
        "100x fewer parameters",
        "latency unproven on this host",
        "champion",
    ):
        assert part in text, part
    assert HOSTILE not in html and "alert(1)" in text
    assert render_report(card, {"training_curve": picture}, tables, [], [GATE]) == render_report(
        card, {"training_curve": picture}, tables, [], [GATE]
    )


def test_a_run_that_stopped_early_still_has_its_report():
    text = checked(render_report(scorecard_json("beam_management", "smoke", TOP1, {}, {}), {}, {}, ["stopped at audit_report"]))
    assert "stopped at audit_report" in text and text.count("not reached") >= 5


def test_the_model_card_says_what_goes_in_and_how_to_call_it(card, picture):
    signature = ModelSignature(
        name="beam",
        budget_us=100.0,
        masks={"rsrp_dbm": "reported"},
        inputs=(
            TensorSpec(name="rsrp_dbm", axes=("ssb_beam",), shape=(16,), unit="dBm"),
            TensorSpec(name="reported", axes=("ssb_beam",), shape=(16,), unit="1"),
        ),
        outputs=(TensorSpec(name="probability", axes=("beam",), shape=(64,), unit="probability"),),
    ).model_dump()
    lineage = pd.DataFrame({"step": ["corpus"], "recipe": ["a1b2c3"]})
    html = render_model_card(
        card,
        {"pipeline": "beam_management", "sha256": "ab" * 32},
        signature,
        {"C": "if (a < b) return 1;"},
        {"training_curve": picture},
        {"Lineage": lineage},
        ["smoke, not deployable"],
        [GATE],
    )
    text = checked(html)
    for part in (
        "ssb_beam",
        "[n, 16]",
        "dBm",
        "[n, 64]",
        "if (a < b) return 1;",
        "a1b2c3",
        "ab" * 32,
        "smoke, not deployable",
        "100 us",
    ):
        assert part in text, part


def test_the_audit_page_is_the_health_card_with_its_findings():
    report = AuditReport(
        verdict="fail",
        rows=2000,
        units=150,
        card=[
            CardRow(check="format", status="ok", sentence="2000 rows."),
            CardRow(check="label noise", status="warn", sentence="3 %."),
        ],
        findings=[
            Finding(fault="out_of_range", severity="fail", where=HOSTILE, value=0.04, threshold=0.0, next_step="Check the unit.")
        ],
        columns=[{"name": "rsrp_dbm", "unit": "dBm", "values": 32000, "missing": 10, "min": -140.0, "max": None}],
        coverage={"site": {"umi_0": 1500, "uma_1": 500}},
        splits={"train": {"rows": 1400, "labelled": 420}},
        sources=[SourceInfo(name="drive", owner="operator", may_leave=False)],
        label_noise=None,
        sampled_rows=2000,
        thresholds=AuditConfig(),
    ).to_json()
    html = render_audit(report)
    text = checked(html)
    for part in (
        "2,000 rows in 150 drops",
        "Verdict: fail",
        "OK",
        "WARN",
        "FAIL",
        "out of range",
        "4 %",
        "Check the unit.",
        "uma_1",
        "1,400",
        "operator",
        "no",
        "-140",
        "–",
    ):
        assert part in text, part
    assert HOSTILE not in html
    assert "No findings." in checked(render_audit({**report, "findings": []}))
