"""Causes by name: what a base station knows first, then hardware, then the radio; several quantities are one scenario."""

from typing import Any

import pytest

from rankd_pipeline.drift.causes import CAUSES, DEFAULT_ACTIONS, Found, Moved, name_causes, worst_action


def context(column: str, before: float = 1.0, after: float = 2.0) -> Moved:
    return Moved(column, "context", column, None, before, after)


def element(number: int, change: float, kind: str = "element", elements: int = 16) -> Moved:
    name = f"l1_rsrp_dbm[ssb_beam {number}]" + (" missing" if kind == "missing" else "")
    return Moved(name, kind, "l1_rsrp_dbm", number, 0.0, change, elements)


def named(*moved: Moved, **options: Any) -> list[Found]:
    given = {"new_sites": [], "new_bands": [], "late": None, "actions": DEFAULT_ACTIONS, "unexplained": None}
    return name_causes(moved, **{**given, **options})


@pytest.mark.parametrize(
    ("moved", "options", "expected"),
    [
        ([], {}, []),
        ([], {"unexplained": "all inputs (p 1e-9)"}, ["unexplained"]),
        ([context("delay_spread_ns")], {}, ["delay_spread"]),
        ([context("doppler_hz")], {}, ["doppler"]),
        ([context("snr_db")], {}, ["power"]),
        ([context("delay_spread_ns"), context("angle_spread_deg")], {}, ["scenario"]),
        ([context("k_factor_db"), context("snr_db"), context("doppler_hz")], {}, ["scenario", "doppler"]),
        ([context("delay_spread_ns"), context("doppler_hz")], {}, ["delay_spread", "doppler"]),
        ([context("delay_spread_ns"), context("snr_db")], {"new_sites": ["hill"]}, ["new_site"]),
        ([context("snr_db"), context("k_factor_db")], {"new_bands": ["28 GHz"]}, ["refarmed_band"]),
        ([], {"new_sites": ["hill"], "new_bands": ["28 GHz"]}, ["new_site", "refarmed_band"]),
        ([element(7, 1.0, "missing")], {}, ["broken_element"]),
        ([element(7, -9.0), context("snr_db")], {}, ["broken_element"]),
        ([element(7, -9.0), element(3, 0.7), element(4, -1.0)], {}, ["broken_element"]),
        ([element(n, 1.0, "missing") for n in range(12)], {}, ["missing_reports"]),
        ([element(n, (-1) ** n * 4.0) for n in range(12)], {"unexplained": "elements"}, ["unexplained"]),
        ([element(7, -1.0)], {"unexplained": "x"}, ["unexplained"]),
        ([], {"late": "p99.9 400 us"}, ["slow_host"]),
        ([context("doppler_hz")], {"late": "p99.9 400 us"}, ["doppler", "slow_host"]),
    ],
)  # fmt: skip
def test_what_moved_gets_its_name(moved: list[Moved], options: dict[str, Any], expected: list[str]) -> None:
    assert [found.cause for found in named(*moved, **options)] == expected


def test_the_detail_says_what_moved_in_its_units() -> None:
    (found,) = named(context("delay_spread_ns", 70.0, 210.0))
    assert found.detail == "delay_spread_ns 70 to 210"
    (found,) = named(element(7, 1.0, "missing"))
    assert "ssb_beam 7: 0% to 100% of its reports missing" in found.detail
    (found,) = named(element(7, -9.0))
    assert found.detail == "ssb_beam 7: -9.0 against the others"


def test_the_table_of_a_function_decides_what_follows() -> None:
    assert set(DEFAULT_ACTIONS) == set(CAUSES)
    table = {**DEFAULT_ACTIONS, "delay_spread": "harmless"}
    harmless = named(context("delay_spread_ns"), actions=table)
    assert worst_action(harmless) == "harmless" and worst_action([]) is None
    both = named(context("delay_spread_ns"), context("doppler_hz"), late="late", actions={**table, "doppler": "harmless"})
    assert worst_action(both) == "operator", "the host first"
    assert worst_action(named(element(7, -9.0), late="late", actions=table)) == "redistill"
