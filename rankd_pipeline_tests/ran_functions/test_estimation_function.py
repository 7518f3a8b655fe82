"""What the steps see of channel estimation: signature, metrics, the deployed file as a predictor, and reports as CSV."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from rankd_pipeline.distillation.heads import GAUSSIAN_90
from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import parse_cell, select
from rankd_pipeline.ran_functions.channel_estimation.config import ChannelCorpusConfig
from rankd_pipeline.ran_functions.channel_estimation.function import DMRS, PILOTS_A_BLOCK, SYMBOLS, ChannelEstimation
from rankd_pipeline.ran_functions.channel_estimation.metrics import evaluate_estimates
from rankd_pipeline.runtime.bundle import MODEL, c_caller, python_caller
from rankd_pipeline.runtime.c_export import compiler, generate_c
from rankd_pipeline.runtime.onnx_export import export_onnx
from rankd_pipeline.spec import load_pipeline

FUNCTION = ChannelEstimation()
CFG = ChannelCorpusConfig()
SIGNATURE = FUNCTION.signatures(CFG, 100.0)[0]


def planted(error_db: dict[str, float], drops: int = 40) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """(features, truth, predictors) where a model's error is the same in every cell, relative to a channel of power 1."""
    rng = np.random.default_rng(0)
    n = 6 * drops
    channel = rng.normal(scale=np.sqrt(0.5), size=(n, 2, 14, 48)).astype(np.float32)
    truth = {"channel": channel, "snr_db": np.tile(np.arange(-2.5, 25, 5), drops), "delay_spread_ns": np.full(n, 100.0)}
    features = {
        "drop_id": np.repeat(np.arange(drops), 6), "site": np.full(n, "tdl_a", object), "band_ghz": np.full(n, 3.5, np.float32),
        "speed_kmh": np.full(n, 50.0),
    }  # fmt: skip

    def predictor(db: float):
        sigma = np.sqrt(0.5 * 10 ** (db / 10))
        estimates = channel + rng.normal(scale=sigma, size=channel.shape)
        half = np.full(channel.shape, GAUSSIAN_90 * sigma)
        return lambda _: np.stack([estimates, half], 1).astype(np.float32)

    return features, truth, {name: predictor(db) for name, db in error_db.items()}


def test_constants_that_must_not_import_sionna_are_those_of_the_slot():
    from rankd_pipeline.radio import pusch

    assert (DMRS, SYMBOLS, PILOTS_A_BLOCK) == (pusch.DMRS_SYMBOLS, pusch.SYMBOLS, pusch.PILOTS_A_BLOCK)


def test_signature_fits_the_networks_and_holds_no_complex_number():
    assert [spec.shape for spec in SIGNATURE.inputs] == [(2, 2, 12), ()]
    assert [spec.shape for spec in SIGNATURE.outputs] == [(2, 14, 48), ()]
    assert all(spec.dtype == "float32" for spec in (*SIGNATURE.inputs, *SIGNATURE.outputs))
    wide = FUNCTION.signatures(ChannelCorpusConfig(resource_blocks=24), 100.0)[0]
    assert wide.inputs[0].shape == (2, 2, 72) and wide.outputs[0].shape == (2, 14, 288)


def test_the_headline_is_the_mean_over_cells_in_db():
    features, truth, models = planted({"good": -20.0, "bad": -10.0})
    table = FUNCTION.evaluate(models, features, truth, "test", frozenset({"good"}))
    metric = FUNCTION.metric
    for name, db in (("good", -20.0), ("bad", -10.0)):
        assert estimate(table, f"{name}@test", metric=metric.name, aggregate=metric.aggregate).value == pytest.approx(db, abs=0.05)
    assert select(table, model="bad", metric="covered").empty
    covered = estimate(table, "good@test", metric="covered", aggregate="off_by(0.9)", resamples=0)
    assert covered.value == pytest.approx(0.0, abs=0.01)
    parts = {tuple(parse_cell(str(cell))) for cell in table["cell"].unique()}
    assert parts == {("site", "band", "snr", "ds", "speed")}
    assert {parse_cell(str(c))["snr"] for c in table["cell"].unique()} == {
        "-5..0", "0..5", "5..10", "10..15", "15..20", "20..25"}  # fmt: skip


def test_one_bad_cell_is_not_drowned():
    features, truth, models = planted({"good": -20.0})
    estimates = models["good"](features)
    worse = estimates.copy()
    here = truth["snr_db"] < 0
    worse[here, 0] += 3 * (worse[here, 0] - truth["channel"][here])
    table = FUNCTION.evaluate({"a": lambda _: estimates, "b": lambda _: worse}, features, truth, "test", frozenset())
    gap = estimate(table, ["b@test"], ["a@test"], metric="nmse", aggregate="worst_cell_db(snr,ds,speed)", higher_is_better=False)
    assert gap.value == pytest.approx(20 * np.log10(4), abs=0.1)
    mean = estimate(table, ["b@test"], ["a@test"], metric="nmse", aggregate="cells_db(snr,ds,speed)", higher_is_better=False)
    assert mean.value == pytest.approx(20 * np.log10(4) / 6, abs=0.05)


def test_estimates_that_do_not_fit_are_refused():
    features, truth, _ = planted({})
    meta = {**features, **truth, "split": np.asarray("test")}
    with pytest.raises(RankdError, match=r"estimates \(240, 2, 14, 48\) for channels \(240, 2, 14, 48\)"):
        evaluate_estimates("m", truth["channel"], truth["channel"], meta, False)
    broken = np.zeros((240, 2, 2, 14, 48), np.float32)
    broken[7] = np.nan
    with pytest.raises(RankdError, match=r"the estimate of sample 7 is not finite \(1 in all\)"):
        evaluate_estimates("m", broken, truth["channel"], meta, False)


def test_the_file_as_a_predictor_gives_estimate_and_interval():
    def run(inputs):
        n = len(inputs["ls"])
        return {"channel": np.ones((n, 2, 14, 48), np.float32), "error_variance": np.full(n, 0.02, np.float32)}

    features = {"ls": np.zeros((3, 2, 2, 12)), "noise_variance": np.ones(3)}
    predicted = FUNCTION.deployed_predictor(run, SIGNATURE)(features)
    assert predicted.shape == (3, 2, 2, 14, 48)
    assert np.allclose(predicted[:, 1], GAUSSIAN_90 * np.sqrt(0.01))


def test_reports_are_read_from_csv_and_errors_name_row_and_column(tmp_path):
    path = tmp_path / "slots.csv"
    path.write_text(FUNCTION.example_rows(CFG))
    inputs = FUNCTION.read_reports(path, SIGNATURE)
    assert inputs["ls"].shape == (1, 2, 2, 12) and inputs["noise_variance"].tolist() == pytest.approx([0.01])
    header, row = path.read_text().splitlines()
    frame = pd.read_csv(path)
    assert frame["im_11_3"][0] == pytest.approx(inputs["ls"][0, 1, 1, 3])
    for text, said in (
        (header.replace("re_2_0", "x"), "column 're_2_0' is missing; expected noise_variance, re_2_0 … im_11_11"),
        (f"{header}\n{row.replace('0.01', '-1', 1)}", "row 2, column 'noise_variance': found '-1', expected a positive number"),
        (f"{header}\n{row}\n0.1,x", "row 3, column 're_2_0': found 'x', expected a number"),
        (header, "it has a header but no slot"),
    ):
        path.write_text(text + "\n")
        with pytest.raises(RankdError) as error:
            FUNCTION.read_reports(path, SIGNATURE)
        assert said in str(error.value)


def test_both_sizes_of_allocation_are_in_the_yaml():
    config = load_pipeline("channel_estimation")
    sizes = {variant: config.at("laptop", variant=variant) for variant in ("default", "prb24")}
    blocks = {name: FUNCTION.corpus_config(spec.steps.corpus.simulation).resource_blocks for name, spec in sizes.items()}
    assert blocks == {"default": 4, "prb24": 24}
    limits = {name: (spec.steps.latency_profile.budget_us, spec.steps.latency_profile.limit_us) for name, spec in sizes.items()}
    assert limits == {"default": (100.0, 20.0), "prb24": (100.0, 100.0)}
    small, usual = (config.at("smoke", variant=name).steps.corpus.simulation for name in ("prb24", "default"))
    assert small == {**usual, "resource_blocks": 24}  # a variant at smoke scale is as small as the scale
    for spec in sizes.values():
        for name, student in spec.students.items():
            model = FUNCTION.student(FUNCTION.corpus_config(spec.steps.corpus.simulation), student.network)
            assert sum(p.numel() for p in model.parameters()) <= 10_000, name


@pytest.mark.parametrize("blocks", [4, 24])
def test_callers_run_for_both_sizes_and_say_the_same(blocks, tmp_path):
    """The Python and the C caller of a bundle: an LS estimate of ones in, a channel of the allocation's shape out."""
    config = load_pipeline("channel_estimation").at("laptop", variant="default" if blocks == 4 else "prb24")
    cfg = FUNCTION.corpus_config(config.steps.corpus.simulation)
    signature = FUNCTION.signatures(cfg, 100.0)[0]
    torch.manual_seed(0)
    student = FUNCTION.student(cfg, config.students["filter_bank"].network)
    export_onnx(FUNCTION.deployable(student, {"radius": GAUSSIAN_90}).eval(), signature, tmp_path / MODEL, {})
    (tmp_path / "caller.py").write_text(python_caller(signature).replace("print(", "np.set_printoptions(threshold=10**6)\nprint("))
    said = subprocess.run([sys.executable, str(tmp_path / "caller.py")], capture_output=True, text=True, check=True).stdout
    values = np.array(said.removeprefix("channel").replace("[", " ").replace("]", " ").split(), float)
    assert values.size == 2 * 14 * 12 * blocks and np.isfinite(values).all()
    if compiler() is None:
        return
    source = generate_c(tmp_path / MODEL, tmp_path, "student")
    text = c_caller(source, signature).replace(
        "= {0};", "= {{{{1}}}};", 1
    )  # some estimate, so that what comes back is not all zero
    (tmp_path / "caller.c").write_text(text)
    binary = tmp_path / "caller"
    build = ["cc", "-O1", str(tmp_path / "caller.c"), str(source.source), "-lm", "-o", str(binary)]
    subprocess.run(build, check=True, capture_output=True)
    lines = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.split()
    assert len(lines) == values.size and np.isfinite(np.array(lines, float)).all() and np.abs(np.array(lines, float)).max() > 0


@pytest.mark.parametrize("shift", list(FUNCTION.shifts))
def test_every_shift_changes_the_field_and_nothing_else(shift):
    plain, shifted = FUNCTION.field_config(CFG, frozenset(), 100), FUNCTION.field_config(CFG, frozenset({shift}), 100)
    assert plain != shifted and plain.seen_slots == shifted.seen_slots >= 44
    assert {profile.family for profile in plain.profiles} == {"TDL", "CDL"} and [band.ghz for band in plain.bands] == [2.6]
    FUNCTION.corpus_config(shifted.model_dump())
