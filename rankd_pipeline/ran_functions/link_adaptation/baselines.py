"""What link adaptation has to beat: what base stations run today, each tuned in the slot loop on the validation traces.

`olla` and `olla_by_doppler` keep the BLER target and set the gate. `cqi_table` and `illa` do not look at HARQ, so nothing holds
their BLER at the target, and `genie` knows the channel: all three are printed beside the others, without a gate.
"""

from collections.abc import Sequence

import numpy as np

from rankd_pipeline.ran_functions.contract import Arrays, Baseline
from rankd_pipeline.ran_functions.link_adaptation.config import BLER_TARGET, LinkCorpusConfig
from rankd_pipeline.ran_functions.link_adaptation.metrics import DOPPLER_CLASSES, DOPPLER_EDGES_HZ, goodput_bit_s_hz
from rankd_pipeline.ran_functions.link_adaptation.policies import CqiTable, Genie, OuterLoop, OuterLoopByDoppler
from rankd_pipeline.ran_functions.link_adaptation.rollout import Policy, Traces, roll_out, traces_of
from rankd_pipeline.ran_functions.link_adaptation.tables import LinkTables, link_tables

STEPS_DB = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
OFFSETS_DB = (-1.0, 0.0, 1.0, 2.0)
UNTUNED_STEP_DB = 0.1
"""Where there are no traces to tune on: telemetry holds windows, not what every MCS would have come to."""
TOLERANCE = 0.01
"""How far the BLER may lie from the target, in the tuning as in the gate."""


def all_baselines(cfg: LinkCorpusConfig) -> tuple[Baseline, ...]:
    """The two that are held against first; see the module's text."""

    def tables() -> LinkTables:
        return link_tables(cfg.allocations_prb, cfg.symbols)

    return (
        Baseline("olla", False, lambda train, val, seed: tuned_outer_loop(val, seed, tables())),
        Baseline("olla_by_doppler", False, lambda train, val, seed: tuned_by_doppler(val, seed, tables())),
        Baseline("illa", False, lambda *_: OuterLoop(tables(), BLER_TARGET, 0.0), gate=False),
        Baseline("cqi_table", False, lambda *_: CqiTable(), gate=False),
        Baseline("genie", False, lambda *_: Genie(), gate=False),
    )


def tuned_outer_loop(val: Arrays, seed: int, tables: LinkTables) -> OuterLoop:
    """The outer loop with the step and first offset of highest goodput among those that keep the BLER within TOLERANCE."""
    if "drop_id" not in val:
        return OuterLoop(tables, BLER_TARGET, UNTUNED_STEP_DB)
    traces = validation_traces(val, seed)
    grid = [OuterLoop(tables, BLER_TARGET, step, offset) for step in STEPS_DB for offset in OFFSETS_DB]
    return grid[_best(*_scores(grid, traces))]


def tuned_by_doppler(val: Arrays, seed: int, tables: LinkTables) -> OuterLoopByDoppler:
    """The same with a step for each class of Doppler, under one first offset."""
    if "drop_id" not in val:
        return OuterLoopByDoppler(tables, BLER_TARGET, DOPPLER_EDGES_HZ, np.full(len(DOPPLER_CLASSES), UNTUNED_STEP_DB), 0.0)
    traces = validation_traces(val, seed)
    kind = np.searchsorted(DOPPLER_EDGES_HZ, traces.doppler_hz_N)
    candidates = []
    for offset in OFFSETS_DB:
        goodput, bler = _scores([OuterLoop(tables, BLER_TARGET, step, offset) for step in STEPS_DB], traces)
        steps = [
            STEPS_DB[_best(goodput[:, kind == k], bler[:, kind == k])] if (kind == k).any() else STEPS_DB[2]
            for k in range(len(DOPPLER_CLASSES))
        ]
        candidates.append(OuterLoopByDoppler(tables, BLER_TARGET, DOPPLER_EDGES_HZ, np.array(steps), offset))
    return candidates[_best(*_scores(candidates, traces))]


def validation_traces(val: Arrays, seed: int) -> Traces:
    """The validation windows as traces; their labels are the truth, the draws of luck are the tuning's own."""
    rows = len(val["drop_id"])
    rng = np.random.default_rng(seed)
    slots = val["cqi"].shape[1]
    truth = {
        "bler": val["label"],
        "draw": rng.random((rows, slots), np.float32),
        "step_slot": np.full(rows, -1),
    }
    return traces_of(val, truth)[0]


def _scores(policies: Sequence[Policy], traces: Traces) -> tuple[np.ndarray, np.ndarray]:
    """Goodput in bit/s/Hz and BLER [policies, N] of each policy on each trace."""
    rollouts = [roll_out(traces, policy) for policy in policies]
    return np.stack([goodput_bit_s_hz(r) for r in rollouts]), np.stack([1.0 - r.ack_NT.mean(axis=1) for r in rollouts])


def _best(goodput: np.ndarray, bler: np.ndarray) -> int:
    """Index of the highest mean goodput among the policies whose mean BLER is near the target, else of the nearest BLER."""
    off = np.abs(bler.mean(axis=1) - BLER_TARGET)
    near = off <= max(TOLERANCE, float(off.min()))
    return int(np.where(near, goodput.mean(axis=1), -np.inf).argmax())
