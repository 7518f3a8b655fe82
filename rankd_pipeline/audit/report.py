"""The audit: reads a corpus once, writes its health card, its findings and one verdict."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from rankd_pipeline.audit.checks import (
    AuditConfig,
    Batches,
    Finding,
    Stream,
    UnitFacts,
    duplicate_findings,
    format_findings,
    identity_findings,
    key_findings,
    unit_facts,
    unit_findings,
)
from rankd_pipeline.audit.patterns import LabelNoise, Sampler, pattern_findings
from rankd_pipeline.audit.schema import CorpusSchema, SourceInfo
from rankd_pipeline.errors import RankdError
from rankd_pipeline.store.tensors import column_array

__all__ = ["AuditConfig", "AuditReport", "CardRow", "Finding", "audit"]

Status = Literal["ok", "warn", "fail"]
# Which findings speak against which row of the card.
CARD_FAULTS: dict[str, frozenset[str]] = {
    "format": frozenset({"format", "null", "unreadable", "empty_corpus"}),
    "ground-truth labels": frozenset(
        {"no_labels", "few_labels", "label_out_of_range", "label_unknown_id", "label_conflict", "label_absent"}
    ),
    "coverage diversity": frozenset({"few_sites", "few_bands", "missing_category"}),
    "missing or corrupt samples": frozenset(
        {
            "not_finite",
            "sentinel",
            "mask_mismatch",
            "missing_values",
            "missing_component",
            "missing_run",
            "rows_missing",
            "short_units",
            "stuck_component",
            "dead_component",
            "clock",
        }
    ),
    "scenario balance": frozenset({"imbalance"}),
    "data sovereignty": frozenset({"sovereignty"}),
    "units and physical ranges": frozenset({"out_of_range", "level_shift", "component_order"}),
    "duplicated drops": frozenset({"duplicate_id", "duplicated_unit", "near_copy", "repeated_rows"}),
    "leakage across splits": frozenset({"split_leak", "inconsistent_key", "unknown_category"}),
    "label noise": frozenset({"label_noise", "label_shift"}),
}


class CardRow(BaseModel):
    """One row of the health card."""

    model_config = ConfigDict(frozen=True)

    check: str
    status: Status
    sentence: str


class AuditReport(BaseModel):
    """What the audit found. A warning does not stop the chain; one failing finding does."""

    model_config = ConfigDict(frozen=True)

    verdict: Literal["pass", "fail"]
    rows: int
    units: int
    card: list[CardRow]
    findings: list[Finding]
    columns: list[dict[str, Any]]
    coverage: dict[str, dict[str, int]]
    splits: dict[str, dict[str, int]]
    sources: list[SourceInfo]
    label_noise: dict[str, float] | None
    sampled_rows: int
    thresholds: AuditConfig

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return json.loads(self.model_dump_json())


def _accepted(finding: Finding, cfg: AuditConfig) -> Finding:
    """A fault that is known of its source does not stop the chain; it is told all the same."""
    known = any(finding.fault in faults and f"source {source}" in finding.where for source, faults in cfg.accept.items())
    return finding.model_copy(update={"severity": "warn"}) if known else finding


def audit(
    feature_batches: Batches,
    labels: pa.Table | None,
    schema: CorpusSchema,
    sources: Sequence[SourceInfo],
    cfg: AuditConfig | None = None,
) -> AuditReport:
    """Audit a corpus.

    :param feature_batches: called once; gives feature tables, as `store.tensors.iter_tables` does
    :param labels: (sample_id, label) of the labelled rows, or None. Nothing else of the truth is read.
    :param sources: who owns the rows of each source
    :returns: the report; memory does not grow with the corpus (identities spill to temporary files)
    """
    cfg = cfg or AuditConfig()
    stream, sampler = Stream(schema, cfg), Sampler(schema, cfg, _usable(labels, schema))
    findings: list[Finding] = []
    try:
        findings += _read(feature_batches, stream, sampler)
        facts = unit_facts(stream)
        findings += format_findings(stream) + key_findings(stream) + identity_findings(stream)
        findings += unit_findings(stream, facts) + duplicate_findings(stream, cfg)
        for counts in stream.columns.values():
            findings += counts.findings(cfg)
        findings += label_findings(stream, labels, schema, cfg)
        findings += diversity_findings(stream, cfg) + sovereignty_findings(stream, sources)
        sample = sampler.sample()
        noise = None
        if sample is not None:
            more, noise = pattern_findings(sample, schema, cfg)
            findings += more
    finally:
        stream.close()
    findings = [_accepted(finding, cfg) for finding in findings]
    findings.sort(key=lambda f: (f.severity != "fail", f.fault, f.where))
    context = _Context(stream, facts, labels, sources, noise, sample.rows if sample else 0)
    return AuditReport(
        verdict="fail" if any(f.severity == "fail" for f in findings) else "pass",
        rows=stream.rows,
        units=facts.units,
        card=_card(findings, context),
        findings=findings,
        columns=[_column_summary(c) for c in stream.columns.values()],
        coverage={name: dict(sorted(counts.items())) for name, counts in stream.key_counts.items()},
        splits=_splits(stream),
        sources=list(sources),
        label_noise=None if noise is None else {"share": noise.share, "low": noise.low, "high": noise.high, "rows": noise.rows},
        sampled_rows=context.sampled,
        thresholds=cfg,
    )


def _usable(labels: pa.Table | None, schema: CorpusSchema) -> pa.Table | None:
    if labels is None or not schema.label.classes or not labels.num_rows:
        return None
    missing = {"sample_id", schema.label.name} - set(labels.column_names)
    if missing:
        raise RankdError(f"labels: column {sorted(missing)[0]} is missing; found {', '.join(labels.column_names)}.")
    return labels.filter(pc.field(schema.label.name).is_valid())


def _read(batches: Batches, stream: Stream, sampler: Sampler) -> list[Finding]:
    try:
        for table in batches():
            if stream.update(table):
                sampler.update(table)
    except (RankdError, pa.ArrowException, OSError) as error:
        return [
            Finding(
                fault="unreadable",
                severity="fail",
                where=str(error).splitlines()[0],
                value=stream.batches,
                threshold=0,
                unit="batches read before",
                next_step="write the shard again, or remove it; nothing after it was audited",
            )
        ]
    if not stream.rows:
        return [
            Finding(
                fault="empty_corpus",
                severity="fail",
                where="no sound row",
                value=0,
                threshold=1,
                unit="rows",
                next_step="check the source and its column map",
            )
        ]
    return []


# -- findings about labels, coverage, owners ----------------------------------------------------------------------
def label_findings(stream: Stream, labels: pa.Table | None, schema: CorpusSchema, cfg: AuditConfig) -> list[Finding]:
    """Labels against their range, the corpus' ids, each other, and the rows that claim to be labelled."""
    if not schema.label.classes:
        return []
    if labels is None or not labels.num_rows:
        return [
            Finding(
                fault="no_labels",
                severity="warn",
                where="whole corpus",
                value=0,
                threshold=cfg.labelled_warn,
                next_step="get labels from a simulation oracle, a classical sweep or experts before a teacher is trained",
            )
        ]
    found = []
    values = column_array(labels[schema.label.name]).astype(float)
    ids = column_array(labels["sample_id"])
    wrong = ~((values >= 0) & (values < schema.label.classes) & (values == np.floor(values)))
    if wrong.any():
        base = " (indexes seem to start at 1)" if np.nanmin(values) >= 1 and np.nanmax(values) == schema.label.classes else ""
        found.append(
            Finding(
                fault="label_out_of_range",
                severity="fail",
                where=f"sample {ids[wrong][0]}: label {values[wrong][0]:g}{base}",
                value=float(wrong.mean()),
                threshold=0,
                next_step=f"labels are whole numbers from 0 to {schema.label.classes - 1}; correct the index base or drop the rows",
            )
        )
    unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if (counts > 1).any():
        found.append(
            Finding(
                fault="label_conflict",
                severity="fail",
                where=f"sample {unique[counts > 1][0]} and others have two labels",
                value=float((counts - 1).sum() / len(ids)),
                threshold=0,
                next_step="keep one label a sample",
            )
        )
    known = sum(int(np.isin(np.unique(records["id"]), unique).sum()) for records in stream.ids)
    if known < len(unique):
        found.append(
            Finding(
                fault="label_unknown_id",
                severity="fail",
                where=f"{len(unique) - known} labels belong to no row",
                value=(len(unique) - known) / len(unique),
                threshold=0,
                next_step="labels and features come from different corpora, or rows were lost; join by sample_id again",
            )
        )
    claimed = sum(stream.labelled.values())
    if schema.has(schema.labelled_column) and claimed > known and claimed - known > 0.001 * claimed:
        found.append(
            Finding(
                fault="label_absent",
                severity="warn",
                where=f"{claimed - known} rows say that they are labelled and have no label",
                value=(claimed - known) / claimed,
                threshold=0.001,
                next_step="deliver their labels or mark the rows as unlabelled",
            )
        )
    train = stream.key_counts[schema.split_column].get("train", 0)
    if train and stream.labelled and stream.labelled["train"] / train < cfg.labelled_warn:
        found.append(
            Finding(
                fault="few_labels",
                severity="warn",
                where="training rows",
                value=stream.labelled["train"] / train,
                threshold=cfg.labelled_warn,
                next_step="label more training rows; pre-training without labels helps up to a point",
            )
        )
    return found


def diversity_findings(stream: Stream, cfg: AuditConfig) -> list[Finding]:
    """Too few sites or bands, scenarios out of balance."""
    found, schema = [], stream.schema
    for fault, column, least in (
        ("few_sites", schema.site_column, cfg.min_sites),
        ("few_bands", schema.band_column, cfg.min_bands),
    ):
        if column and stream.rows and (have := len(stream.key_counts[column])) < least:
            found.append(
                Finding(
                    fault=fault,
                    severity="warn",
                    where=f"column {column}",
                    value=have,
                    threshold=least,
                    unit="distinct values",
                    next_step=f"a network trained on {have} {column} may not carry over to another; add some",
                )
            )
    for column in schema.balance_columns:
        inside = stream.by_split[column]
        # A held-out site is in no training row by design; a scenario that only held-out rows have is starved.
        seen = [inside[split] for split in inside if schema.held_out.get(split) != column]
        counts = inside.get("train") or stream.key_counts[column]
        categories = schema.column(column).categories or sorted(set().union(*seen))
        shares = {c: counts.get(c, 0) for c in categories}
        if len(shares) < 2 or not sum(shares.values()):
            continue
        rare, common = min(shares, key=lambda c: shares[c]), max(shares, key=lambda c: shares[c])
        ratio = shares[common] / max(shares[rare], 1)
        if ratio > cfg.imbalance_warn:
            found.append(
                Finding(
                    fault="imbalance",
                    severity="warn",
                    where=f"column {column}, training rows: {common} {shares[common]}, {rare} {shares[rare]}",
                    value=ratio,
                    threshold=cfg.imbalance_warn,
                    unit="largest over smallest",
                    next_step=f"collect more {rare}, or weight it up in training",
                )
            )
    return found


def sovereignty_findings(stream: Stream, sources: Sequence[SourceInfo]) -> list[Finding]:
    """Rows whose source nobody owns or nobody declared."""
    column = stream.schema.source_column
    if not column:
        return []
    declared = {s.name: s for s in sources}
    found = []
    for name, rows in stream.key_counts[column].items():
        problem = "" if name in declared else "is not declared"
        if not problem and not declared[name].owner.strip():
            problem = "has no owner"
        if problem:
            found.append(
                Finding(
                    fault="sovereignty",
                    severity="fail",
                    where=f"source {name} {problem}",
                    value=rows / max(stream.rows, 1),
                    threshold=0,
                    next_step="declare each source with its owner and whether it may leave the premises",
                )
            )
    return found


# -- the card -----------------------------------------------------------------------------------------------------
class _Context:
    """What the sentences of the card draw on."""

    def __init__(
        self,
        stream: Stream,
        facts: UnitFacts,
        labels: pa.Table | None,
        sources: Sequence[SourceInfo],
        noise: LabelNoise | None,
        sampled: int,
    ) -> None:
        self.stream, self.facts, self.labels, self.sources, self.noise, self.sampled = (
            stream,
            facts,
            labels,
            sources,
            noise,
            sampled,
        )


def _card(findings: list[Finding], context: _Context) -> list[CardRow]:
    sentences = dict(_sentences(context))
    card = []
    for check, faults in CARD_FAULTS.items():
        against = [f for f in findings if f.fault in faults]
        status: Status = "fail" if any(f.severity == "fail" for f in against) else "warn" if against else "ok"
        text = sentences[check]
        if against:
            kinds = Counter(f.fault for f in against)
            text += " Found: " + ", ".join(f"{k.replace('_', ' ')}" + (f" ({n} times)" if n > 1 else "") for k, n in kinds.items())
            text += f"; {against[0].where}."
        card.append(CardRow(check=check, status=status, sentence=text))
    return card


def _sentences(c: _Context) -> Iterator[tuple[str, str]]:
    stream, schema = c.stream, c.stream.schema
    rows = max(stream.rows, 1)
    shapes = ", ".join(
        f"{s.name} [{'x'.join(map(str, s.shape))}] {s.unit}".strip() for s in schema.columns if s.shape and s.role == "feature"
    )
    yield (
        "format",
        f"{stream.rows} rows in {stream.batches} batches, {len(schema.columns)} columns as declared ({shapes or 'no tensors'}).",
    )
    splits = stream.key_counts[schema.split_column]
    train, have = splits.get("train", 0), 0 if c.labels is None else c.labels.num_rows
    share = f"; {stream.labelled['train'] / train:.0%} of {train} training rows are labelled" if train and stream.labelled else ""
    yield "ground-truth labels", f"{have} labels for {stream.rows} rows, {schema.label.classes} classes{share}."
    parts = [
        f"{len(v)} {k}"
        for k, v in stream.key_counts.items()
        if k in {schema.site_column, schema.band_column, *schema.balance_columns}
    ]
    held = [f"{s} ({', '.join(sorted(stream.by_split[col].get(s, {})))})" for s, col in schema.held_out.items() if splits.get(s)]
    yield "coverage diversity", f"{', '.join(parts) or 'no site or band column'}; held out: {', '.join(held) or 'nothing'}."
    values = sum(v.values for v in stream.columns.values() if v.spec.role == "feature")
    missing = sum(v.bad["missing"] for v in stream.columns.values())
    empty = sum(v.rows_empty for v in stream.columns.values())
    bad = sum(v.bad[k] for v in stream.columns.values() for k in ("not_finite", "sentinel", "mask_mismatch"))
    yield (
        "missing or corrupt samples",
        (
            f"{missing / max(values, 1):.1%} of {values} values are missing by mask, {empty} rows have none at all; "
            f"{bad} values are corrupt; "
            f"{c.facts.rows_missing} time steps have no row."
        ),
    )
    shares = [
        f"{col}: " + ", ".join(f"{k} {n / rows:.0%}" for k, n in sorted(stream.key_counts[col].items()))
        for col in schema.balance_columns
    ]
    yield "scenario balance", f"{'; '.join(shares) or 'no scenario column'}."
    stay = [s.name for s in c.sources if not s.may_leave]
    owners = ", ".join(f"{s.name} of {s.owner or 'nobody'}" for s in c.sources)
    yield (
        "data sovereignty",
        f"{len(c.sources)} sources: {owners or 'none'}; "
        f"{'must stay on the premises: ' + ', '.join(stay) if stay else 'all may leave the premises'}.",
    )
    ranges = [f"{v.spec.name} {v.low:g} to {v.high:g} {v.spec.unit}".strip() for v in stream.columns.values() if np.isfinite(v.low)]
    outside = sum(v.bad["out_of_range"] for v in stream.columns.values())
    yield "units and physical ranges", f"{'; '.join(ranges)}; {outside} values out of range."
    yield (
        "duplicated drops",
        f"{c.facts.units} {schema.unit_column}, compared by the hash of every row and by nearest rows on {c.sampled} rows.",
    )
    yield (
        "leakage across splits",
        f"{', '.join(f'{k} {n}' for k, n in sorted(splits.items()))} rows; "
        f"{c.facts.torn_splits} {schema.unit_column} in more than one split.",
    )
    if c.noise is None:
        yield "label noise", "Too few labelled rows for an estimate."
    else:
        yield (
            "label noise",
            f"About {c.noise.share:.1%} of labels are wrong "
            f"(95 % interval {c.noise.low:.1%} to {c.noise.high:.1%}, {c.noise.where}).",
        )


def _column_summary(counts: Any) -> dict[str, Any]:
    good = counts.values - sum(counts.bad.values())
    low, high = (counts.low, counts.high) if np.isfinite(counts.low) else (None, None)
    return {
        "name": counts.spec.name,
        "unit": counts.spec.unit,
        "values": counts.values,
        "missing": counts.bad["missing"],
        "min": None if low is None else float(low),
        "max": None if high is None else float(high),
        "mean": counts.total / good if good > 0 else None,
        **{k: counts.bad[k] for k in ("not_finite", "sentinel", "out_of_range", "mask_mismatch")},
    }


def _splits(stream: Stream) -> dict[str, dict[str, int]]:
    return {
        split: {"rows": rows, "labelled": stream.labelled.get(split, 0)}
        for split, rows in sorted(stream.key_counts[stream.schema.split_column].items())
    }
