"""The slot loop, the classical policies and the metrics, on cases whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sionna.sys import OuterLoopLinkAdaptation, PHYAbstraction

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.link_adaptation import metrics
from rankd_pipeline.ran_functions.link_adaptation.policies import CqiTable, Genie, OuterLoop, OuterLoopByDoppler
from rankd_pipeline.ran_functions.link_adaptation.rollout import Choice, Policy, Rollout, Traces, around, roll_out, traces_of
from rankd_pipeline.ran_functions.link_adaptation.tables import CQI_TO_MCS, EFFICIENCY, N_MCS, link_tables


@pytest.fixture(scope="module")
def links():
    return link_tables((8, 24, 72), 12)


def still(sinr_db: np.ndarray, links, slots: int, seed: int = 0, claim_db: float = 0.0, **changes) -> Traces:
    """Users of a channel that does not move, whose CQI claims `claim_db` too much."""
    n = len(sinr_db)
    bler = links.bler_at(sinr_db.astype(np.float32), np.ones(n, int))
    cqi = np.searchsorted(links.cqi_sinr_db_Q, sinr_db + claim_db, side="right") - 1
    fields = {
        "cqi_NT": np.repeat(cqi.astype(np.uint8)[:, None], slots, axis=1),
        "cqi_age_slots_NT": np.full((n, slots), 8, np.uint8),
        "doppler_hz_N": np.full(n, 10.0, np.float32),
        "allocated_prb_N": np.full(n, 24, np.int16),
        "harq_delay_N": np.full(n, 6),
        "bler_NTM": np.repeat(bler[:, None], slots, axis=1).astype(np.float16),
        "draw_NT": np.random.default_rng(seed).random((n, slots)).astype(np.float32),
        "step_slot_N": np.full(n, -1),
    }
    return Traces(**{**fields, **changes})


class Script(Policy):
    """Sends with a given MCS every slot and writes down what it was told."""

    def __init__(self, mcs_NT: np.ndarray) -> None:
        self.mcs, self.told = mcs_NT, []

    def start(self, traces: Traces) -> None:
        self.told = []

    def choose(self, report) -> Choice:
        self.told.append({name: np.array(value) for name, value in report.items()})
        return Choice(self.mcs[:, len(self.told) - 1])


def test_feedback_arrives_when_its_delay_is_over_and_says_what_became_of_the_block(links):
    traces = still(np.array([3.0, 12.0]), links, 30, harq_delay_N=np.array([4, 7]))
    mcs = np.random.default_rng(1).integers(0, N_MCS, (2, 30))
    policy = Script(mcs)
    result = roll_out(traces, policy)
    for user, delay in enumerate((4, 7)):
        for slot in range(30):
            told = {name: value[user] for name, value in policy.told[slot].items()}
            if slot < delay:
                assert told["harq_mask"] == told["harq_ack"] == told["harq_mcs"] == 0
                continue
            lost = traces.bler_NTM[user, slot - delay, mcs[user, slot - delay]] > traces.draw_NT[user, slot - delay]
            assert (told["harq_mask"], told["harq_mcs"], told["harq_ack"]) == (1, mcs[user, slot - delay], not lost)
    np.testing.assert_array_equal(result.mcs_NT, mcs)


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_all_policies_meet_the_same_luck(links, seed, delay):
    """Two policies that choose alike get the same answers, in every slot."""
    traces = still(np.array([6.0, 16.0]), links, 20, seed, harq_delay_N=np.full(2, delay))
    mcs = np.random.default_rng(seed).integers(0, N_MCS, (2, 20))
    np.testing.assert_array_equal(roll_out(traces, Script(mcs)).ack_NT, roll_out(traces, Script(mcs.copy())).ack_NT)


def test_cqi_table_sends_what_was_asked_for(links):
    result = roll_out(still(np.linspace(-8, 28, 12), links, 3), CqiTable())
    cqi = still(np.linspace(-8, 28, 12), links, 3).cqi_NT
    np.testing.assert_array_equal(result.mcs_NT, CQI_TO_MCS[cqi])


def test_outer_loop_is_sionna_s(links):
    """The same CQI, allocation and feedback into both: the same MCS and the same offset, slot by slot."""
    n, slots, up = 6, 120, 0.7
    traces = still(np.linspace(4, 20, n), links, slots, claim_db=1.5)
    mine = OuterLoop(links, 0.1, up)
    phy = PHYAbstraction(snr_db_interp_min_max_delta=(-14.0, 32.05, 0.1), device="cpu")
    theirs = OuterLoopLinkAdaptation(phy, n, bler_target=0.1, delta_up=up, device="cpu")
    result = roll_out(traces, mine)
    elements = torch.full((n,), 24 * 12 * 12, dtype=torch.int32)
    for slot in range(slots):
        feedback = np.where(result.harq_mask_NT[:, slot] > 0, result.harq_ack_NT[:, slot], -1)
        sinr = torch.from_numpy(10 ** (links.cqi_sinr_db_Q[traces.cqi_NT[:, slot]] / 10)).float()
        found = theirs(elements, torch.from_numpy(feedback.astype(np.int32)), sinr, mcs_table_index=2, mcs_category=1)
        # Sionna's shipped table lacks MCS 0 and 1, and rounds SINR at the border of a bin as float32 falls.
        assert np.abs(found.numpy() - result.mcs_NT[:, slot]).max() <= 1
        assert np.mean(found.numpy() == result.mcs_NT[:, slot]) > 0.6
    np.testing.assert_allclose(theirs.offset.numpy(), mine.offset, atol=1e-4)


@pytest.mark.parametrize("claim_db", [-2.0, 0.0, 3.0])
def test_outer_loop_holds_the_target_whatever_the_cqi_claims(links, claim_db):
    result = roll_out(still(np.linspace(4, 20, 40), links, 3000, claim_db=claim_db), OuterLoop(links, 0.1, 0.5))
    assert 1 - result.ack_NT[:, 1000:].mean() == pytest.approx(0.1, abs=0.01)


def test_inner_loop_believes_the_cqi(links):
    """Without an outer loop a CQI that promises 3 dB too much costs what it costs."""
    honest, boastful = (
        1 - roll_out(still(np.linspace(4, 20, 40), links, 400, claim_db=db), OuterLoop(links, 0.1, 0.0)).ack_NT.mean()
        for db in (0.0, 3.0)
    )
    assert honest < 0.1 < 0.5 < boastful


def test_a_step_of_its_own_for_each_class_of_doppler(links):
    traces = still(np.full(3, 12.0), links, 5, doppler_hz_N=np.array([5.0, 60.0, 300.0], np.float32))
    policy = OuterLoopByDoppler(links, 0.1, metrics.DOPPLER_EDGES_HZ, np.array([0.1, 0.2, 0.4]), 1.0)
    policy.start(traces)
    np.testing.assert_allclose(policy.up, [0.1, 0.2, 0.4])
    np.testing.assert_allclose(policy.down, np.array([0.1, 0.2, 0.4]) / 9)
    np.testing.assert_allclose(policy.offset, 1.0)


def test_nobody_beats_the_genie(links):
    rng = np.random.default_rng(3)
    traces = still(np.full(20, 12.0), links, 200)
    moving = links.bler_at(rng.uniform(0, 24, 20 * 200).astype(np.float32), np.ones(4000, int)).reshape(20, 200, N_MCS)
    traces = Traces(**{**vars(traces), "bler_NTM": moving.astype(np.float16)})
    genie = metrics.expected_bit_s_hz(traces, roll_out(traces, Genie())).mean()
    assert genie == pytest.approx(metrics.genie_bit_s_hz(traces).mean(), rel=1e-6)
    for policy in (CqiTable(), OuterLoop(links, 0.1, 0.3), Script(rng.integers(0, N_MCS, (20, 200)))):
        assert metrics.expected_bit_s_hz(traces, roll_out(traces, policy)).mean() < genie


def test_shadow_mode_answers_every_logged_slot(links):
    traces = still(np.array([5.0, 15.0]), links, 12)
    features = {
        "cqi": traces.cqi_NT, "cqi_age_slots": traces.cqi_age_slots_NT, "harq_ack": np.ones((2, 12), np.uint8),
        "harq_mask": np.ones((2, 12), np.uint8), "harq_mcs": np.full((2, 12), 3, np.uint8), "doppler_hz": traces.doppler_hz_N,
        "allocated_prb": traces.allocated_prb_N, "harq_delay_slots": traces.harq_delay_N,
    }  # fmt: skip
    said = OuterLoop(links, 0.1, 0.5)(features)
    assert said.shape == (2, 12, N_MCS)
    assert (np.diff(said, axis=-1) >= -1e-6).all()
    chosen = (said <= 0.1).sum(axis=-1) - 1
    assert (np.diff(chosen, axis=1) >= 0).all() and chosen[0, -1] < chosen[1, -1]  # nothing but ACKs: it only climbs
    table = CqiTable()(features)  # it knows no BLER: what it would not send is lost, all else arrives
    np.testing.assert_array_equal(N_MCS - table.sum(axis=-1), CQI_TO_MCS[traces.cqi_NT] + 1)


def test_traces_are_put_together_in_time_whatever_the_order_of_the_rows():
    rng = np.random.default_rng(0)
    drops, windows, slots = 3, 4, 8
    rows = [(drop, window) for drop in range(drops) for window in range(windows)]
    order = rng.permutation(len(rows))
    cqi = np.array([[drop * 4 + window] * slots for drop, window in rows], np.uint8)
    features = {
        "drop_id": np.array([drop for drop, _ in rows]), "time_s": np.array([10.0 * drop + window for drop, window in rows]),
        "cqi": cqi, "cqi_age_slots": cqi, "doppler_hz": np.array([float(drop) for drop, _ in rows]),
        "allocated_prb": np.array([drop for drop, _ in rows]), "harq_delay_slots": np.full(len(rows), 5),
    }  # fmt: skip
    truth = {"bler": np.zeros((12, slots, N_MCS)), "draw": np.zeros((12, slots)), "step_slot": np.full(12, -1)}
    shuffled = {name: values[order] for name, values in features.items()}
    traces, first = traces_of(shuffled, {name: values[order] for name, values in truth.items()})
    np.testing.assert_array_equal(traces.cqi_NT, cqi.reshape(drops, windows * slots))
    np.testing.assert_array_equal(shuffled["drop_id"][first], [0, 1, 2])
    np.testing.assert_array_equal(traces.doppler_hz_N, [0, 1, 2])
    with pytest.raises(RankdError, match="drop_id 2: it has 3 windows, others have 4"):
        traces_of({name: values[:-1] for name, values in features.items()}, {name: values[:-1] for name, values in truth.items()})


# -- metrics ------------------------------------------------------------------------------------------------------------
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=40), min_size=1, max_size=4), st.integers(1, 4))
def test_bursts_counts_runs(rows, length):
    width = min(map(len, rows))
    lost = np.array([row[:width] for row in rows])

    def counted(row) -> int:
        text = "".join("x" if lost_here else "." for lost_here in row)
        return sum(len(run) >= length for run in text.split("."))

    np.testing.assert_array_equal(metrics.bursts(lost, length), [counted(row) for row in lost])


def rolled(mcs_NT: np.ndarray, ack_NT: np.ndarray, expected=None) -> Rollout:
    nothing = np.zeros_like(mcs_NT)
    return Rollout(mcs_NT.astype(np.int8), ack_NT, nothing, nothing, nothing, expected)


def test_goodput_is_what_was_acknowledged():
    mcs, ack = np.array([[0, 27, 27, 5]]), np.array([[True, True, False, False]])
    np.testing.assert_allclose(metrics.goodput_bit_s_hz(rolled(mcs, ack)), (EFFICIENCY[0] + EFFICIENCY[27]) / 4, rtol=1e-6)


def test_settling_is_counted_from_the_jump(links):
    """From slot 100 only MCS 4 gets through; a policy that sends MCS 20 for 30 slots more needs just that long."""
    slots, jump, late = 400, 100, 30
    bler = np.ones((1, slots, N_MCS), np.float16)
    bler[:, :jump, :21] = 0.0
    bler[:, jump:, :5] = 0.0
    traces = still(np.array([12.0]), links, slots, bler_NTM=bler, step_slot_N=np.array([jump]))
    slow = np.where(np.arange(slots) < jump + late, 20, 4)[None]
    prompt = np.where(np.arange(slots) < jump, 20, 4)[None]
    ack = np.ones((1, slots), bool)
    assert metrics.settling_slots(traces, rolled(prompt, ack)) == [0]
    # settled once at most a tenth of the next WINDOW slots is lost
    assert metrics.settling_slots(traces, rolled(slow, ack)) == [late - metrics.WINDOW // 10]
    assert np.isnan(metrics.settling_slots(still(np.array([12.0]), links, slots), rolled(prompt, ack))).all()


def test_predictions_are_judged_where_they_matter(links):
    """A policy that says the truth has no calibration error; one that says 0.2 too much has 0.2 of it, bin by bin."""
    traces = still(np.linspace(5, 20, 6), links, 50)
    mcs = np.repeat(np.arange(6, 24, 3)[:, None], 50, axis=1)
    truth = around(traces.bler_NTM.reshape(300, -1), mcs.reshape(-1)).reshape(6, 50, -1)
    meta = {"drop_id": np.arange(6), "site": np.array(["a"] * 6), "band_ghz": np.full(6, 3.5), "doppler_hz": np.full(6, 50.0)}
    for added, wanted in ((0.0, 0.0), (0.2, 0.2)):
        expected = np.clip(truth * 0.8 + added, 0, 1).astype(np.float32) if added else truth
        table = metrics.evaluate_rollout("m", "test", traces, rolled(mcs, np.ones((6, 50), bool), expected), meta, True)
        gap = table[table["metric"].astype(str).str.startswith("ece_bin")]
        ece = sum(abs((rows["value"] * rows["n"]).sum()) for _, rows in gap.groupby("metric", observed=True)) / gap["n"].sum()
        low = truth[np.isfinite(truth)]
        assert ece == pytest.approx(float(np.abs(np.clip(low * 0.8 + added, 0, 1) - low).mean()) if added else wanted, abs=1e-3)
        assert set(table["cell"].astype(str)) == {"site=a|band=3.5GHz|doppler=medium"}
    quiet = metrics.evaluate_rollout("m", "test", traces, rolled(mcs, np.ones((6, 50), bool)), meta, True)
    assert not quiet["metric"].astype(str).str.startswith("ece").any()


def test_the_table_holds_one_row_a_user_and_metric(links):
    traces = still(np.linspace(5, 20, 4), links, 60)
    meta = {"drop_id": np.array([7, 8, 9, 10]), "site": np.array(list("aabb")), "band_ghz": np.full(4, 2.1),
            "doppler_hz": np.array([5, 50, 500, 5.0])}  # fmt: skip
    table = metrics.evaluate_rollout("olla", "val", traces, roll_out(traces, OuterLoop(links, 0.1, 0.2)), meta, False)
    counts = table.groupby("metric", observed=True).size().to_dict()
    assert counts == {"goodput": 4, "goodput_p5": 4, "goodput_share": 4, "bler": 4, "nack_bursts": 4}
    assert table[table["metric"] == "bler"]["value"].between(0, 1).all()
    assert set(table["unit"]) == {7, 8, 9, 10} and (table["n"] == 60).all()


def test_a_policy_takes_another_target_and_stays_itself(links):
    """The same loop at 1 %: as one made for 1 %, and the first one is as it was; a genie has no target."""
    traces = still(np.linspace(2, 26, 10), links, 60)
    loops: tuple[tuple[Policy, Policy], ...] = (
        (OuterLoop(links, 0.1, 0.3, 1.0), OuterLoop(links, 0.01, 0.3, 1.0)),
        (
            OuterLoopByDoppler(links, 0.1, (30.0,), np.array([0.1, 0.4]), 1.0),
            OuterLoopByDoppler(links, 0.01, (30.0,), np.array([0.1, 0.4]), 1.0),
        ),
    )
    for loop, strict in loops:
        before = roll_out(traces, loop).mcs_NT
        np.testing.assert_array_equal(roll_out(traces, loop.aiming_at(0.01)).mcs_NT, roll_out(traces, strict).mcs_NT)
        np.testing.assert_array_equal(roll_out(traces, loop).mcs_NT, before)
        assert roll_out(traces, strict).mcs_NT.mean() < before.mean()
    with pytest.raises(RankdError, match="Genie has no BLER target"):
        Genie().aiming_at(0.01)
