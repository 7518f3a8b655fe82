"""The long table: what is valid, and that it comes back from disk as it went."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.table import (
    COLUMNS,
    concat_tables,
    format_cell,
    parse_cell,
    read_table,
    select,
    validate_table,
    write_table,
)
from rankd_pipeline_tests.evaluation.planted import planted_table

WORD = st.text(st.characters(codec="utf-8", exclude_characters="|=", exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(st.dictionaries(WORD, WORD, max_size=4))
def test_cell_names_come_back_as_they_went(parts):
    assert parse_cell(format_cell(**parts)) == parts


@pytest.mark.parametrize("parts", [{"site": "a|b"}, {"site": "a=b"}, {"a|b": "x"}])
def test_a_separator_in_a_cell_part_is_refused(parts):
    with pytest.raises(RankdError, match="rename"):
        format_cell(**parts)


def test_round_trip_and_same_bytes(tmp_path):
    table = planted_table({"teacher@test": 0.7, "student@test": 0.6, "teacher@heldout_site": 0.5}, drops=50)
    write_table(table, tmp_path / "a.parquet")
    # The same rows by way of text columns and other category orders give the same bytes.
    text = table.astype({c: "object" for c in ("model", "split", "cell", "metric")})
    text["model"] = pd.Categorical(text["model"], categories=["teacher", "unused", "student"])
    write_table(text, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    back = read_table(tmp_path / "a.parquet")
    assert list(back.columns) == list(COLUMNS)
    for column in COLUMNS:
        assert back[column].tolist() == table[column].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="unit"), r"missing \['unit'\]"),
        (lambda t: t.assign(extra=1), r"unknown \['extra'\]"),
        (lambda t: t.assign(value=t["value"].where(t.index != 3)), "'value' is nan in row 3"),
        (lambda t: t.assign(n=0), "'n' is 0 in row 0"),
        (lambda t: t.assign(n=0.5), "'n' has type float64"),
        (lambda t: t.assign(cell="site a"), "cell 'site a'"),
        (lambda t: t.assign(model=7), "'model' holds 7"),
        (lambda t: t.assign(split=None), "'split' is empty in row 0"),
    ],
)
def test_a_bad_table_is_refused_with_its_row(change, message):
    with pytest.raises(RankdError, match=message):
        validate_table(change(planted_table({"teacher@test": 0.7}, drops=5)))


def test_a_file_that_is_no_table_is_one_sentence(tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(RankdError, match="cannot be read as Parquet"):
        read_table(tmp_path / "x.parquet")


def test_select_filters_on_cell_parts():
    table = concat_tables(
        [
            planted_table({"t@test": 0.5}, drops=4, cell="site=a|link=los"),
            planted_table({"t@test": 0.5}, drops=3, cell="site=b|link=los"),
            planted_table({"t@test": 0.5}, drops=2, cell="site=a|link=nlos", metric="ece_bin_01"),
        ]
    )
    assert len(select(table, where={"site": "a"})) == 6
    assert len(select(table, where={"site": ["a", "b"], "link": "los"})) == 7
    assert len(select(table, where={"site": "a", "link": "los"})) == 4
    assert len(select(table, metric="ece_bin_*")) == 2
    assert select(table, where={"no_such_part": "a"}).empty
