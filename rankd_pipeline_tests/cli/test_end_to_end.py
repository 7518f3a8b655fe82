"""The command on a real chain: one home in which beam_management has run once at smoke scale."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import load_pipeline, pipeline_files
from rankd_pipeline.steps.chain import CHAIN, STEPS
from rankd_pipeline.steps.runner import open_store, recipe_of, resolve
from rankd_pipeline.store.artifact import MANIFEST, OBSERVED, Artifact
from rankd_pipeline_tests.cli.scorecard_keys import KEYS

COMMAND = [sys.executable, "-m", "rankd_pipeline.cli"]


def environment(current: Settings, **extra: str) -> dict[str, str]:
    return {**os.environ, "RANKD_HOME": str(current.home), "COLUMNS": "200", "OMP_NUM_THREADS": "1", **extra}


def rankd(current: Settings, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], env=environment(current, **extra), capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def own(smoke_chain: Settings, tmp_path: Path) -> Settings:
    """A copy of the home, for tests that damage things."""
    shutil.copytree(smoke_chain.home, tmp_path / "home")
    return Settings(tmp_path / "home", str(tmp_path / "home" / "store"), f"sqlite:///{tmp_path}/home/mlflow/mlflow.db", None, 1)


def made(current: Settings, step: str, scale: str = "smoke") -> Artifact:
    artifact = resolve(step, load_pipeline("beam_management").at(scale), open_store(current))
    assert artifact is not None
    return artifact


def keys_of(value: object) -> object:
    """The shape of a JSON object: its keys, nested; anything else is null."""
    return {key: keys_of(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_report_is_one_object_with_exactly_the_promised_keys(smoke_chain: Settings) -> None:
    card = json.loads(rankd(smoke_chain, "report", "beam_management", "--json").stdout)
    found = keys_of(card)
    assert isinstance(found, dict) and list(found.pop("seconds")) == list(STEPS)
    assert found == {key: value for key, value in KEYS.items() if key != "seconds"}
    assert card["function"] == "beam_management" and card["scale"] == "smoke"
    assert 0 < card["student"]["params"] < card["teacher"]["params"] and card["latency"]["p50_us"] > 0
    assert card["deployment"]["version"] >= 1 and card["deployment"]["alias"] is None, "smoke is never the champion"
    assert all(seconds >= 0 for seconds in card["seconds"].values())


def test_report_says_where_things_lie(smoke_chain: Settings) -> None:
    done = rankd(smoke_chain, "report", "beam_management", "--scale", "smoke")
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if line.startswith(("report:", "bundle:", "model card:")))
    assert Path(lines["report"].strip()).read_text().startswith("<!")
    assert Path(lines["model card"].strip()).parent == Path(lines["bundle"].strip())
    assert "smoke scale: gates are shown, not enforced" in done.stdout
    assert "no champion yet" in rankd(smoke_chain, "report", "beam_management", "--champion").stderr


def test_a_second_run_makes_nothing(smoke_chain: Settings) -> None:
    done = rankd(smoke_chain, "run", "beam_management", "--scale", "smoke")
    assert done.returncode == 0 and all(f"{step}: stored" in done.stdout for step in STEPS), done.stdout + done.stderr
    assert "Done in" in done.stdout and "rankd ui" in done.stdout
    assert "Nothing would run." in rankd(smoke_chain, "plan", "beam_management", "--scale", "smoke").stdout


def test_plan_says_what_a_changed_setting_costs(smoke_chain: Settings, tmp_path: Path) -> None:
    text = pipeline_files()["beam_management"].read_text()
    changed = tmp_path / "defs.yaml"
    changed.write_text(text.replace("alpha: 0.7", "alpha: 0.6"))
    out = rankd(smoke_chain, "plan", str(changed), "--scale", "smoke").stdout
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()[0] in STEPS}
    assert " no " in rows["soft_labels"] and "changed: config.alpha" in rows["student"]
    assert "its input student would be made anew" in rows["quantized_onnx"]


def test_lineage_reads_from_a_bundle_that_was_carried_away(smoke_chain: Settings, tmp_path: Path) -> None:
    bundle = tmp_path / "carried"
    shutil.copytree(made(smoke_chain, "deployment").path / "bundle", bundle)
    nowhere = Settings(tmp_path / "empty", str(tmp_path / "empty" / "store"), "", None, 1)
    done = rankd(nowhere, "lineage", bundle, "--json", RANKD_STORE=nowhere.store_uri)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["intact"] and not nowhere.home.exists()
    by_step = {item["step"]: item for item in found["made"]}
    assert set(by_step) == set(STEPS) - {"deployment"} and by_step["corpus"]["recipe"] == made(smoke_chain, "corpus").recipe
    assert by_step["teacher"]["run_id"] and by_step["corpus"]["seed"] == 0 and len(found["sites"]) >= 8
    here = json.loads(rankd(smoke_chain, "lineage", bundle, "--json").stdout)
    assert all("have their hash" in item["checked"] for item in here["made"])
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    broken = rankd(smoke_chain, "lineage", bundle)
    assert broken.returncode == 2 and "PROBLEM" in broken.stdout and "model.onnx was changed" in broken.stdout


def test_a_model_uri_leads_to_the_same_lineage(smoke_chain: Settings) -> None:
    card = json.loads(rankd(smoke_chain, "report", "beam_management", "--json").stdout)
    done = rankd(smoke_chain, "lineage", f"models:/beam_management/{card['deployment']['version']}", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["path"] == str(made(smoke_chain, "deployment").path / "bundle")
    missing = rankd(smoke_chain, "lineage", "models:/beam_management@champion")
    assert missing.returncode == 2 and "not in MLflow" in missing.stderr


def test_predict_decides_good_rows_and_refuses_bad_ones_without_torch(smoke_chain: Settings, tmp_path: Path) -> None:
    bundle = made(smoke_chain, "deployment").path / "bundle"
    names = [f"ssb_{beam}_dbm" for beam in range(16)]
    rows = [[-80 - (beam + row) % 16 for beam in range(16)] for row in range(4)]
    reports, out = tmp_path / "reports.csv", tmp_path / "out.csv"
    with reports.open("w", newline="") as handle:
        csv.writer(handle).writerows([names, *rows[:2], ["loud", *rows[2][1:]], ["", *rows[3][1:]]])
    (tmp_path / "torch.py").write_text("raise ImportError('a target machine has no torch')")
    done = rankd(smoke_chain, "predict", bundle, reports, "-o", out, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "row 4 refused: column 'ssb_0_dbm': found 'loud'" in done.stderr
    assert "3 rows decided, 1 refused." in done.stderr
    with out.open() as handle:
        decided = list(csv.DictReader(handle))
    assert [row["row"] for row in decided] == ["2", "3", "5"]
    assert all(0 <= int(row["narrow_beam"]) < 64 and 0 < float(row["probability"]) <= 1 for row in decided)
    reports.write_text(",".join(names) + "\n" + ",".join(map(str, rows[0])) + "\n")
    good = rankd(smoke_chain, "predict", bundle, reports)
    assert good.returncode == 0 and good.stdout.splitlines()[1].split(",")[1] == decided[0]["narrow_beam"]


def test_gc_keeps_what_the_last_runs_reached(own: Settings) -> None:
    before = {step: made(own, step).recipe for step in STEPS}
    assert rankd(own, "gc", "--apply").returncode == 0
    assert {step: made(own, step).recipe for step in STEPS} == before
    assert "Nothing to remove." in rankd(own, "gc").stdout


def test_an_edited_artifact_is_one_sentence_and_is_remade(own: Settings) -> None:
    soft_labels, student = made(own, "soft_labels"), made(own, "student")
    victim = soft_labels.path / next(iter(soft_labels.manifest["files"]))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    again = ("run", "beam_management", "--scale", "smoke", "--step", "soft_labels")
    done = rankd(own, *again)
    assert done.returncode == 2 and str(victim) in done.stderr and "Delete the folder" in done.stderr, done.stderr
    shutil.rmtree(soft_labels.path)
    done = rankd(own, *again)
    assert done.returncode == 0 and "soft_labels: stored" not in done.stdout, done.stdout + done.stderr
    assert "Nothing would run." in rankd(own, "plan", "beam_management", "--scale", "smoke").stdout
    remade = made(own, "soft_labels")
    assert (remade.version, remade.manifest_sha256) == (
        soft_labels.version,
        student.manifest["inputs"]["soft_labels"]["manifest_sha256"],
    )
    assert rankd(own, "lineage", made(own, "deployment").path).returncode == 0


def test_two_runs_at_once_take_turns(own: Settings) -> None:
    command = [*COMMAND, "run", "beam_management", "--scale", "smoke", "--step", "corpus"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment(own), **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    assert sum("another run of beam_management is under way" in out for out, _ in outputs) == 1


@pytest.mark.parametrize("wait_s", [0.5, 2.0])  # while the step loads its libraries, and while it works
def test_interrupting_a_run_is_one_sentence_and_it_goes_on(home: Settings, wait_s: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "beam_management", "--scale", "smoke", "--step", "corpus"],
        env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline() != "corpus: started\n":
        assert process.poll() is None
    time.sleep(wait_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert resolve("corpus", load_pipeline("beam_management").at("smoke"), open_store(home)) is None


def test_a_gate_stops_a_laptop_run_with_exit_code_3_and_a_next_step(own: Settings) -> None:
    plant_laptop(own, "calibration_scorecard", "fail")
    done = rankd(own, "run", "beam_management", "--scale", "laptop")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "stopped by a gate at calibration_scorecard" in done.stderr and "Next: " in done.stderr
    card = json.loads(rankd(own, "report", "beam_management", "--json").stdout)
    assert card["scale"] == "laptop" and card["teacher"]["verdict"] == "fail"
    assert card["student"] is None and card["deployment"] is None and card["seconds"]["student"] is None


def plant_laptop(current: Settings, last: str, verdict: str) -> None:
    """What the smoke chain made, published under laptop recipes up to a gate with another verdict."""
    store, spec = open_store(current), load_pipeline("beam_management").at("laptop")
    planted: dict[str, Artifact] = {}
    for info in CHAIN:
        inputs = {name: planted[name] for name in info.inputs}
        source = made(current, info.name)
        draft = store.draft(recipe_of(info.name, spec, inputs))
        shutil.copytree(source.path, draft.out, dirs_exist_ok=True)
        for name in (MANIFEST, OBSERVED):
            (draft.out / name).unlink()
        draft.metrics.update(source.metrics)
        draft.observed.update(seconds=1.0, finished=time.time(), run_id=None)
        if "verdict" in source.metrics:
            wanted = verdict if info.name == last else "pass"
            draft.metrics["verdict"] = wanted
            draft.metrics["gates"] = [{**gate, "verdict": wanted} for gate in source.metrics.get("gates", [])]
        planted[info.name] = store.publish(draft, inputs)
        if info.name == last:
            return
