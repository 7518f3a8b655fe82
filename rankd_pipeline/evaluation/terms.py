"""The two small texts that a gate's YAML is made of: an aggregate, `quantile(0.95)`, and a term, `teacher@test`."""

import re

from rankd_pipeline.errors import RankdError

_AGGREGATE = re.compile(
    r"(?P<name>mean|db|db_of_cells|cells_db|ece|off_by|worst_cell|worst_cell_db|crossing|quantile)(?:\((?P<argument>[^()]+)\))?"
)
_BY_CELL = ("worst_cell", "worst_cell_db", "db_of_cells", "cells_db")


def parse_aggregate(text: str) -> tuple[str, str | None]:
    """Split ``"quantile(0.95)"`` into name and argument; RankdError says what is allowed."""
    match = _AGGREGATE.fullmatch(text.strip())
    name, argument = (match["name"], match["argument"]) if match else (None, None)
    if name in ("quantile", "off_by", "crossing"):
        level, comma, part = (argument or "").partition(",")
        try:
            ok = 0.0 < float(level) < 1.0 and bool(comma and part.strip()) == (name == "crossing")
        except ValueError:
            ok = False
    else:
        ok = name in _BY_CELL or (name is not None and argument is None)
    if not ok or name is None:
        raise RankdError(
            f"Aggregate {text!r} is unknown; expected mean, db, ece, worst_cell, worst_cell_db, cells_db or db_of_cells (these "
            "four also with (<part>,...)), quantile(<0..1>), off_by(<0..1>) or crossing(<0..1>,<part>)."
        )
    return name, argument


def split_term(term: str) -> tuple[str, str]:
    """``"teacher@test"`` -> ``("teacher", "test")``."""
    model, at, split = term.partition("@")
    if not (model and at and split) or "@" in split:
        raise RankdError(f"Term {term!r} is not 'model@split', e.g. 'teacher@test'.")
    return model, split
