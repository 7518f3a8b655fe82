"""The YAML of every pipeline: scales, variants, and one clear sentence for each mistake."""

from pathlib import Path

import pytest
import yaml

from rankd_pipeline.errors import RankdError
from rankd_pipeline.spec import SCALES, deep_merge, load_pipeline, pipeline_files


def write(tmp_path: Path, change) -> Path:
    document = yaml.safe_load(pipeline_files()["beam_management"].read_text())
    change(document["attributes"])
    path = tmp_path / "defs.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("name", sorted(pipeline_files()))
@pytest.mark.parametrize("scale", SCALES)
def test_every_shipped_pipeline_validates_at_every_scale(name, scale):
    spec = load_pipeline(name).at(scale)
    assert spec.pipeline == name
    assert spec.enforced == (scale != "smoke")


def test_scales_merge_over_the_laptop_configuration():
    config = load_pipeline("beam_management")
    assert config.at("smoke").steps.student.paired_seeds == 2
    assert config.at("laptop").steps.student.paired_seeds == 5
    assert config.at("smoke").steps.student.alpha == config.at("laptop").steps.student.alpha


def test_deep_merge_replaces_lists_and_keeps_the_rest():
    assert deep_merge({"a": {"b": [1, 2], "c": 3}}, {"a": {"b": [9]}}) == {"a": {"b": [9], "c": 3}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a["steps"].update(techer={}), "unknown key 'techer'"),
        (lambda a: a["steps"]["latency_profile"].update(budget_us=-1), "latency_profile.budget_us"),
        (lambda a: a["steps"].pop("latency_profile"), "latency_profile"),
        (lambda a: a["gates"]["calibration_scorecard"][0].update(comparator="=>"), "comparator"),
        (lambda a: a.update(scales={"huge": {}}), "scales.huge"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_key(tmp_path, change, expected):
    with pytest.raises(RankdError) as caught:
        load_pipeline(write(tmp_path, change)).at("laptop")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_scale_variant_pipeline_and_no_yaml(tmp_path):
    config = load_pipeline("beam_management")
    for ask in (lambda: config.at("tiny"), lambda: config.at("smoke", variant="x"), lambda: load_pipeline("no_such")):
        with pytest.raises(RankdError, match="expected one of"):
            ask()
    broken = tmp_path / "x.yaml"
    broken.write_text("a: [1")
    with pytest.raises(RankdError, match="not YAML"):
        load_pipeline(broken)


def test_student_candidates_share_what_they_do_not_say():
    config = load_pipeline("beam_management")
    assert list(config.at("smoke").students) == ["student"]
    own = {"small": {"network": {"hidden": [8]}}, "large": {"fit": {"lr": 0.5}}}
    both = config.model_copy(update={"steps": deep_merge(config.steps, {"student": {"candidates": own}})}).at("smoke").students
    alone = config.at("smoke").students["student"]
    assert both["small"].network == {**alone.network, "hidden": [8]} and both["small"].fit == alone.fit
    assert both["large"].network == alone.network and both["large"].fit == {**alone.fit, "lr": 0.5}
    with pytest.raises(RankdError, match="candidates"):
        bad = deep_merge(config.steps, {"student": {"candidates": {"Not ok": {}}}})
        config.model_copy(update={"steps": bad}).at("smoke")
