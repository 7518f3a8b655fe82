"""The `rankd` command: what it imports, how it fails, and the commands that need no chain."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rankd_pipeline.cli import main
from rankd_pipeline.cli.bundles import read_rows
from rankd_pipeline.cli.console import SCALE
from rankd_pipeline.cli.live import Board, watched
from rankd_pipeline.cli.runs import _say_outcome
from rankd_pipeline.errors import Busy, GateStopped, RankdError
from rankd_pipeline.orchestration.execute import RunOutcome, StepEvent
from rankd_pipeline.progress import progress_of
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import Settings
from rankd_pipeline.settings import settings as read_settings
from rankd_pipeline.spec import SCALES, load_pipeline
from rankd_pipeline.store.artifact import Store
from rankd_pipeline.store.lineage import LINEAGE
from rankd_pipeline_tests.store.test_lineage import bundle, chain

HEAVY = (
    "torch",
    "dagster",
    "mlflow",
    "sionna",
    "onnxruntime",
    "onnx",
    "sklearn",
    "matplotlib",
    "pandas",
    "pyarrow",
    "pydantic",
    "numpy",
)


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own; `main` writes to the environment, which is put back."""
    for name in ("RANKD_STORE", "RANKD_MLFLOW_URI", "RANKD_DAGSTER_POSTGRES_URL", "RANKD_WORKERS", "DAGSTER_HOME"):
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what main() changes
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


def rankd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["rankd", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def a_model(path: Path) -> Path:
    """y = relu(x W), 8 -> 4."""
    weights = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


# -- start-up ---------------------------------------------------------------------------------------------------------
def test_help_imports_nothing_heavy_and_starts_in_half_a_second(tmp_path: Path) -> None:
    code = f"import sys, rankd_pipeline.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "rankd_pipeline.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.5  # CPU time: the wall clock belongs to whoever else runs here


def test_the_scales_of_the_command_are_those_of_the_spec() -> None:
    assert tuple(SCALE.choices) == SCALES


# -- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "no_function"], "no_function: no such pipeline; expected one of beam_management"),
        (["run", "beam_management", "--variant", "x"], "variant 'x': unknown"),
        (["run", "beam_management", "--step", "teachr"], "step 'teachr': unknown; expected one of corpus"),
        (["run", "beam_management", "--scale", "huge"], "'huge' is not one of 'smoke', 'laptop', 'gpu'"),
        (["plan", "missing.yaml"], "missing.yaml: no such pipeline"),
        (["report", "beam_management"], "no run in"),
        (["report", "beam_management", "--champion"], "no champion yet"),
        (["report", "beam_management", "--scale", "gpu"], "no run at scale gpu"),
        (["ablate", "beam_management", "nothing"], "ablation 'nothing': unknown; expected one of"),
        (["predict", "nowhere", "reports.csv"], "nowhere: no such file or folder; expected a bundle"),
        (["lineage", "nowhere"], "nowhere: no such file or folder; expected a bundle"),
        (["lineage", "models:/beam_management"], "expected models:/NAME@ALIAS"),
        (["pin", "abc"], "abc: expected the beginning of one recipe"),
        (["unpin", "abc"], "abc: expected the beginning of one pinned recipe; pinned are: none"),
        (["profile", "nowhere.onnx", "--budget-us", "100"], "nowhere.onnx"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_home: Path
) -> None:
    code, out, err = rankd(capsys, monkeypatch, *arguments)
    assert code == 2 and sentence in err and "Traceback" not in err and out == ""
    assert not empty_home.exists(), "a refused command leaves nothing behind"


def test_a_bad_setting_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKD_WORKERS", "many")
    code, _, err = rankd(capsys, monkeypatch, "functions")
    assert code == 2 and err == "rankd: RANKD_WORKERS: found 'many', expected a whole number of processes from 1 up.\n"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (GateStopped("the teacher is not better; add labels"), 3, "add labels"),
        (Busy("teacher is being made"), 4, "being made"),
        (KeyboardInterrupt(), 130, "the same command goes on from there"),
        (OSError(28, "No space left on device", "/data/x"), 2, "No space left on device (/data/x): free space"),
    ],
)
def test_what_stops_a_command_decides_its_exit_code(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise error

    monkeypatch.setattr("rankd_pipeline.spec.load_pipeline", stopped)
    found, _, err = rankd(capsys, monkeypatch, "plan", "beam_management")
    assert found == code and sentence in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_home_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKD_HOME", str(tmp_path / "file" / "home"))
    code, _, err = rankd(capsys, monkeypatch, "init")
    assert code == 2 and "cannot be set up as rankd's home" in err and "set RANKD_HOME" in err


@pytest.mark.parametrize(("status", "code"), [("stopped", 3), ("failed", 1), ("interrupted", 130)])
def test_how_a_run_ended_is_said_with_its_next_step(
    status: str, code: int, capsys: pytest.CaptureFixture[str], empty_home: Path
) -> None:
    empty_home.mkdir()
    outcome = RunOutcome("run-1", status, "teacher", "too few labels. Next: add labels", exit_code=code)  # type: ignore[arg-type]
    assert _say_outcome(outcome, load_pipeline("beam_management"), read_settings(), 3.0) == code
    err = capsys.readouterr().err
    assert "at teacher: too few labels. Next: add labels" in err and ("log:" in err) == (status == "failed")


# -- progress ---------------------------------------------------------------------------------------------------------
def test_plain_output_has_a_line_for_what_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with watched("toy", ["corpus", "teacher", "student"], tmp_path) as watch:
        watch(StepEvent("", "note", "another run is under way: waiting for it"))
        watch(StepEvent("corpus", "started"))
        watch(StepEvent("corpus", "cached"))
        watch(StepEvent("teacher", "started"))
        watch(StepEvent("teacher", "done", seconds=12.34))
        watch(StepEvent("teacher", "gate", "toy/teacher: verdict fail. margin: 0.03 fraction, needs >= 0.05. Next: labels"))
        watch(StepEvent("student", "note", "Dependencies for step student failed"))
    assert capsys.readouterr().out.splitlines() == [
        "another run is under way: waiting for it", "corpus: started", "corpus: stored", "teacher: started", "teacher: 12.3 s",
        "teacher: verdict fail",
    ]  # fmt: skip


def test_a_running_step_shows_the_share_it_has_done(tmp_path: Path) -> None:
    board = Board("toy", ["corpus"], tmp_path)
    board.note(StepEvent("corpus", "started"))
    with progress_of(tmp_path, "toy", "corpus") as progress:
        board.refresh()
        assert board.rows["corpus"].share is None
        progress(8, 8, "shards")
        board.refresh()
        assert board.rows["corpus"].share == 1.0 and board.rows["corpus"].text == "shards"
    assert list(tmp_path.rglob("*.json")) == []


def test_progress_of_a_killed_process_is_not_shown(tmp_path: Path) -> None:
    code = "import sys,os;from pathlib import Path;from rankd_pipeline.progress import progress_of\n"
    code += "with progress_of(Path(sys.argv[1]), 'toy', 'corpus'): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert list(tmp_path.rglob("corpus.json"))
    board = Board("toy", ["corpus"], tmp_path)
    board.note(StepEvent("corpus", "started"))
    board.refresh()
    assert board.rows["corpus"].text == "" and board.rows["corpus"].share is None


# -- commands that need no chain ----------------------------------------------------------------------------------------
def test_functions_and_plan_tell_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = rankd(capsys, monkeypatch, "functions")
    assert code == 0 and "beam_management" in out and "100 us" in out and "none" in out
    code, out, _ = rankd(capsys, monkeypatch, "plan", "beam_management", "--scale", "smoke")
    assert code == 0 and "never made at scale smoke" in out and "11 of 11 steps would run" in out


def test_lineage_prints_the_tree_and_notices_an_edit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, made = bundle(tmp_path)
    (folder / "model.onnx").unlink()  # a toy: not a model that says what it was made from
    code, out, _ = rankd(capsys, monkeypatch, "lineage", folder)
    assert code == 0 and "4 artifacts: every hash that could be checked holds." in out
    assert "harbour (24), old_town (40)" in out and f"teacher {made['teacher'].recipe}" in out and "run-of-t" in out
    code, out, _ = rankd(capsys, monkeypatch, "lineage", folder, "--json")
    document = json.loads(out)
    assert code == 0 and document["intact"] and {item["step"] for item in document["made"]} == set(made)
    path = folder / LINEAGE
    path.write_text(path.read_text().replace("old_town", "new_town"))
    code, out, _ = rankd(capsys, monkeypatch, "lineage", folder)
    assert code == 2 and "PROBLEM" in out and "NOT intact" in out


def test_gc_is_a_dry_run_and_pins_hold(
    empty_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(empty_home / "store")
    made = chain(store)
    code, out, _ = rankd(capsys, monkeypatch, "gc")
    assert code == 0 and out.count("remove  toy/") == 4 and "Would free" in out and len(list(store.artifacts())) == 4
    assert rankd(capsys, monkeypatch, "pin", made["teacher"].recipe[:10], "--why", "paper")[0] == 0
    code, out, _ = rankd(capsys, monkeypatch, "gc", "--apply")
    assert code == 0 and {item.step for item in store.artifacts()} == {"corpus", "teacher"} and "pinned: paper" in out
    assert rankd(capsys, monkeypatch, "unpin", made["teacher"].recipe[:10])[0] == 0
    rankd(capsys, monkeypatch, "gc", "--apply")
    assert list(store.artifacts()) == [] and "Nothing to remove." in rankd(capsys, monkeypatch, "gc")[1]


def test_profile_races_any_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plot = a_model(tmp_path / "m.onnx"), tmp_path / "m.png"
    code, out, _ = rankd(
        capsys,
        monkeypatch,
        "profile",
        model,
        "--budget-us",
        "0.0001",
        "--runs",
        "200",
        "--slot-us",
        "200",
        "--json",
        "--plot",
        plot,
    )
    report = json.loads(out)
    assert code == 3 and report["verdict"] == "fail", "no call takes a ten-thousandth of a microsecond"
    assert plot.read_bytes().startswith(b"\x89PNG") and any(item["runtime"] == "onnxruntime-fp32" for item in report["candidates"])
    (tmp_path / "no.onnx").write_text("this is no model")
    code, _, err = rankd(capsys, monkeypatch, "profile", tmp_path / "no.onnx", "--budget-us", "100")
    assert code == 2 and "no.onnx" in err and "Traceback" not in err


def test_doctor_tells_what_is_there_and_how_noisy_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_home: Path
) -> None:
    monkeypatch.setattr("rankd_pipeline.cli.host.JITTER_RUNS", 2000)
    code, out, _ = rankd(capsys, monkeypatch, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and ["ok", "torch"] in [line[:2] for line in found["packages"]]
    jitter = found["jitter"]
    assert jitter["runs"] == 2000 == sum(jitter["histogram"]) and 0 < jitter["p50_us"] <= jitter["p999_us"] <= jitter["max_us"]
    empty_home.mkdir()
    (empty_home / "mlflow").mkdir()
    (empty_home / "mlflow" / "mlflow.db").write_text("not a database")
    monkeypatch.setattr("rankd_pipeline.cli.host.NEEDED", ("torch", "no-such-distribution"))
    monkeypatch.setenv("PATH", str(empty_home))
    code, out, _ = rankd(capsys, monkeypatch, "doctor")
    assert code == 2 and "install it: pip install no-such-distribution" in out and "'not built'" in out
    assert "not a database" in out, "a broken database is told"


# -- reports from a file --------------------------------------------------------------------------------------------------
def beam_reader():
    function = load_function("beam_management")
    config = function.corpus_config({})
    signature = function.signatures(config, 100.0)[0]
    return function.example_rows(config), lambda path: function.read_reports(path, signature)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["good", "text", "unit", "empty"]), min_size=1, max_size=30))
def test_bad_rows_are_refused_by_number_and_good_ones_kept(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    example, read = beam_reader()
    header, line = example.splitlines()
    cells = line.split(",")
    rows = {"good": line, "text": ",".join(["loud", *cells[1:]]), "unit": ",".join(["-9000", *cells[1:]]), "empty": ""}
    path = tmp_path_factory.mktemp("reports") / "reports.csv"
    path.write_text("\n".join([header, *(rows[kind] for kind in kinds)]) + "\n")
    good = [number for number, kind in enumerate(kinds, 2) if kind == "good"]
    bad = [number for number, kind in enumerate(kinds, 2) if kind in ("text", "unit")]
    if not good and bad:
        with pytest.raises(RankdError, match=f"no row could be used; row {bad[0]}: column"):
            read_rows(path, read)
    elif not good:
        with pytest.raises(RankdError, match=r"reports\.csv: it has a header but no report"):
            read_rows(path, read)
    else:
        numbers, inputs, refused = read_rows(path, read)
        assert numbers == good and [number for number, _ in refused] == bad
        assert all(len(values) == len(good) for values in inputs.values())
        assert all("column 'ssb_0_dbm'" in reason for _, reason in refused)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b"ssb_0_dbm\n-90\n"])
def test_a_file_that_is_no_report_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "reports.csv"
    path.write_bytes(content)
    with pytest.raises(RankdError, match=r"reports\.csv"):
        read_rows(path, beam_reader()[1])


def test_settings_are_read_anew(empty_home: Path) -> None:
    assert isinstance(read_settings(), Settings) and read_settings().home == empty_home and os.environ["RANKD_HOME"]
