"""Expert labels: good rows are kept, bad ones refused by row number."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ingest.annotations import read_annotations

KNOWN = {1, 2, 3, 4, 5}


def write(folder: Path, text: str) -> Path:
    path = folder / "expert.csv"
    path.write_text(text)
    return path


def test_good_rows_are_kept_and_bad_ones_refused_by_row(tmp_path: Path) -> None:
    path = write(tmp_path, "sample_id,label,annotator,confidence\n"
                 "1,7,ana,0.9\n2,64,ana,1\n9,3,ana,1\n3,x,ana,1\n4,5,ana,2\n5,6,bo\n3,12,bo,\n")  # fmt: skip
    good, rejected = read_annotations(path, 64, KNOWN)
    assert good.to_pydict() == {
        "sample_id": [1, 3], "label": [7, 12], "annotator": ["ana", "bo"], "confidence": [pytest.approx(0.9), 1.0],
    }  # fmt: skip
    assert [row for row, _ in rejected] == [3, 4, 5, 6, 7]
    reasons = dict(rejected)
    assert reasons[3] == "label 64 is not in 0 to 63"
    assert reasons[4] == "sample_id 9 is not in the corpus"
    assert reasons[5] == "label 'x' is not a whole number"
    assert reasons[6] == "confidence 2 is not in 0 to 1"
    assert "number of columns" in reasons[7]


def test_experts_who_disagree_are_both_refused_and_who_agree_count_once(tmp_path: Path) -> None:
    good, rejected = read_annotations(write(tmp_path, "sample_id,label\n1,7\n2,8\n1,9\n2,8\n"), 64, KNOWN)
    assert good["sample_id"].to_pylist() == [2]
    assert rejected == [(2, "sample_id 1 has another label in row 4"), (4, "sample_id 1 has another label in row 2")]


@pytest.mark.parametrize("text", ["", "id,label\n1,2\n"])
def test_a_missing_column_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(RankdError, match="'sample_id' is missing"):
        read_annotations(write(tmp_path, text), 64, KNOWN)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(RankdError, match="cannot be read"):
        read_annotations(tmp_path / "none.csv", 64, KNOWN)
    (tmp_path / "binary.csv").write_bytes(b"sample_id,label\n\xff\xfe\x00\n")
    with pytest.raises(RankdError, match="cannot be read"):
        read_annotations(tmp_path / "binary.csv", 64, KNOWN)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text("0123456789.-xé ", max_size=4), st.text("0123456789.-xé ", max_size=4)), max_size=12))
def test_every_row_is_kept_or_refused(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    lines = ["sample_id,label", *(f"{a},{b}" for a, b in cells)]
    path = tmp_path / "any.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    good, rejected = read_annotations(path, 64, KNOWN)
    assert set(good["sample_id"].to_pylist()) <= KNOWN
    assert all(0 <= label < 64 for label in good["label"].to_pylist())
    assert all(2 <= row <= len(lines) and reason for row, reason in rejected)
    agreeing = sum(1 for a, b in cells) - len(rejected)
    assert good.num_rows <= agreeing
    assert (good.num_rows == 0) == (agreeing == 0)
