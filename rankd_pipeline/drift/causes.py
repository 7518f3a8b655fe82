"""Why the field moved, in the field's own words: from what was found to have moved to one named cause.

What a base station knows for certain comes first (a site or a band that was not there before), then hardware (elements
of the reports), then the radio quantities. Several radio quantities that move together are another propagation
scenario, not several causes; a site or a band that is new moves them all, and is then the only cause.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Cause = Literal[
    "new_site", "refarmed_band", "broken_element", "missing_reports", "scenario", "delay_spread", "doppler", "k_factor",
    "angle_spread", "power", "slow_host", "unexplained",
]  # fmt: skip
Action = Literal["redistill", "operator", "harmless"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
DEFAULT_ACTIONS: Mapping[Cause, Action] = {cause: "operator" if cause == "slow_host" else "redistill" for cause in CAUSES}
SEVERITY: tuple[Action, ...] = ("harmless", "operator", "redistill")
RADIO: Mapping[Cause, str] = {
    "delay_spread": "delay_spread_ns", "doppler": "doppler_hz", "k_factor": "k_factor_db", "angle_spread": "angle_spread_deg",
    "power": "snr_db",
}  # fmt: skip
"""Cause -> the context column that shows it."""
SCENARIO = ("delay_spread", "k_factor", "angle_spread", "power")
FEW = 0.25
"""Up to this share of a tensor's elements is a fault of elements; more is no longer one."""


@dataclass(frozen=True)
class Found:
    """One cause: detail says what moved, in units; action what the function's table asks for."""

    cause: Cause
    detail: str
    action: Action


@dataclass(frozen=True)
class Moved:
    """One series that moved: from and to are medians (means of shares); element and of as in series.Series."""

    name: str
    kind: str
    of: str
    element: int | None
    before: float
    after: float
    elements: int = 1


def name_causes(
    moved: Sequence[Moved],
    new_sites: Collection[str],
    new_bands: Collection[str],
    late: str | None,
    actions: Mapping[Cause, Action],
    unexplained: str | None,
) -> list[Found]:
    """Every cause, the first one first. late: a sentence if the latency budget is broken. unexplained: what moved at all."""

    def found(cause: Cause, detail: str) -> Found:
        return Found(cause, detail, actions[cause])

    causes: list[Found] = []
    if new_sites:
        causes.append(found("new_site", f"site {', '.join(sorted(new_sites))} was not there before"))
    if new_bands:
        causes.append(found("refarmed_band", f"carrier {', '.join(sorted(new_bands))} was not there before"))
    if not causes:
        causes += [found(cause, detail) for cause, detail in _elements(moved)]
        causes += [found(cause, detail) for cause, detail in _radio(moved, bool(causes))]
    if late is not None:
        causes.append(found("slow_host", late))
    if not causes and unexplained is not None:
        causes.append(found("unexplained", unexplained))
    return causes


def worst_action(causes: Sequence[Found]) -> Action | None:
    """What the causes together ask for; None without any."""
    return SEVERITY[max(SEVERITY.index(item.action) for item in causes)] if causes else None


def _elements(moved: Sequence[Moved]) -> list[tuple[Cause, str]]:
    """Faults of single elements (an SSB beam), or missing reports where many are hit."""
    missing = [item for item in moved if item.kind == "missing" and item.after - item.before > 0.3]
    causes: list[tuple[Cause, str]] = []
    for column in dict.fromkeys(item.of for item in missing):
        hit = [item for item in missing if item.of == column]
        if hit[0].elements > 1 and len(hit) <= max(1, FEW * hit[0].elements):
            causes.append(("broken_element", "; ".join(f"{_short(item.name)}: {_share(item)}" for item in hit)))
        else:
            causes.append(("missing_reports", f"{column}: {_share(hit[0])} ({len(hit)} of {hit[0].elements} elements)"))
    for column in dict.fromkeys(item.of for item in moved if item.kind == "element"):
        hit = [item for item in moved if item.kind == "element" and item.of == column]
        # The largest move must stand alone: where all elements move against each other, it is no fault of one.
        largest = max(abs(item.after - item.before) for item in hit)
        outliers = [item for item in hit if abs(item.after - item.before) >= 0.5 * largest]
        lost = {item.element for item in missing if item.of == column}
        if largest >= 3.0 and len(outliers) <= max(1, FEW * hit[0].elements) and not lost & {item.element for item in outliers}:
            changes = "; ".join(f"{_short(item.name)}: {item.after - item.before:+.1f} against the others" for item in outliers)
            causes.append(("broken_element", changes))
    return causes


def _radio(moved: Sequence[Moved], hardware: bool) -> list[tuple[Cause, str]]:
    """Radio quantities that moved: one each, or one scenario. A hardware fault lowers the power of its own accord."""
    by_cause: dict[Cause, str] = {}
    for cause, column in RADIO.items():
        hit = [item for item in moved if item.kind == "context" and item.of == column]
        if hit and not (hardware and cause == "power"):
            by_cause[cause] = "; ".join(f"{item.name} {item.before:.3g} to {item.after:.3g}" for item in hit)
    together = [cause for cause in SCENARIO if cause in by_cause]
    if len(together) >= 2:
        detail = "; ".join(by_cause.pop(cause) for cause in together)  # type: ignore[arg-type]
        return [("scenario", f"{', '.join(together)} moved together: {detail}"), *by_cause.items()]
    return list(by_cause.items())


def _short(name: str) -> str:
    """`ssb_beam 7` from `l1_rsrp_dbm[ssb_beam 7] missing`."""
    return name[name.index("[") + 1 : name.rindex("]")] if "[" in name else name


def _share(item: Moved) -> str:
    return f"{item.before:.0%} to {item.after:.0%} of its reports missing"
