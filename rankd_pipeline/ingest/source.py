"""How a user describes a table of their own: which column is what, in which unit, whose it is, how it is split."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankd_pipeline.audit.schema import ARROW_TYPES, SourceInfo
from rankd_pipeline.spec import validated


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ColumnMap(_Strict):
    """Where one of our columns comes from.

    from: the column's name in the file. For a tensor a pattern with {i} for the component, counted from `first`, and, where the
        file holds past instants too, {t} for the instant (0 = oldest).
    value: a constant instead. unit: the unit in the file. also: other units that some of its rows are in; a value that the
        first unit puts out of range is read in the next. sentinels: numbers or texts that mean "not measured".
    index_base: what the first index is in the file (0 or 1). values: their names of categories -> ours.
    fill: what a missing entry becomes. shape, dtype, unit_ours, range: of a truth column; for features the schema says.
    """

    source: str | None = Field(default=None, alias="from")
    value: float | int | bool | str | None = None
    first: int = 0
    unit: str | None = None
    also: tuple[str, ...] = ()
    sentinels: tuple[float | str, ...] = ()
    index_base: Literal[0, 1] = 0
    values: dict[str, str] = {}
    fill: float | None = None
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    unit_ours: str = ""
    range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "ColumnMap":
        if (self.source is None) == (self.value is None):
            raise ValueError("give either from (a column of the file) or value (a constant)")
        if self.dtype not in ARROW_TYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ARROW_TYPES)}")
        return self


class DropRule(_Strict):
    """What belongs together and is never split: the rows of one value of `column`, or rows of one value of all columns `by`,
    at one site and band, as long as the time between them stays within `gap_s`."""

    column: str | None = None
    by: tuple[str, ...] = ()
    gap_s: float = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _one_rule(self) -> "DropRule":
        if (self.column is None) == (not self.by):
            raise ValueError("give either column (a trajectory id) or by (the columns that tell users apart)")
        return self


class SourceConfig(_Strict):
    """A user's own table. Paths are inside the rankd home.

    columns: our feature columns -> theirs. truth: our truth columns -> theirs; rows that lack one of them are used for training
        without labels. label: the best class of a row, written to each truth column named in label_into.
    split_shares: training, validation, test, of the drops of each site and band that are not held out.
    """

    path: str
    name: str
    owner: str
    may_leave: bool
    kind: Literal["simulation", "drive_test", "network_log", "laboratory", "other"] = "drive_test"
    format: Literal["auto", "csv", "parquet"] = "auto"
    delimiter: str = ","
    columns: dict[str, ColumnMap]
    truth: dict[str, ColumnMap] = {}
    label: ColumnMap | None = None
    label_into: tuple[str, ...] = ()
    drop: DropRule
    split_shares: tuple[float, float, float] = (0.70, 0.15, 0.15)
    heldout_sites: tuple[str, ...] = ()
    heldout_bands: tuple[float, ...] = ()
    rows_per_shard: int = Field(default=4096, ge=1)
    most_rejected: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> "SourceConfig":
        if min(self.split_shares) < 0 or abs(sum(self.split_shares) - 1) > 1e-6:
            raise ValueError(f"split_shares must be three shares that add up to 1, found {self.split_shares}")
        return self

    @property
    def info(self) -> SourceInfo:
        """What the audit's sovereignty check needs to know of this source."""
        return SourceInfo(name=self.name, owner=self.owner, may_leave=self.may_leave, kind=self.kind)


def load_source(raw: Mapping[str, Any]) -> SourceConfig:
    """The `source:` part of a pipeline's YAML. Raises: RankdError naming the key."""
    return validated(SourceConfig, dict(raw), "steps.corpus.source")
