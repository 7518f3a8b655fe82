"""Link adaptation beside the plain way: the slot loop against Sionna's own blocks, the student's call against PyTorch eager."""

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.side_by_side import Row, alternate, eager_p50_us

USERS, PRB, SYMBOLS = 64, 24, 12


def slot_loop() -> list[Row]:
    """Slots of a user a second of an outer loop in the slot loop, against `OuterLoopLinkAdaptation` and `PHYAbstraction` of Sionna.

    Both sides: 64 users, one thread, one decision and one block a slot. Ours holds the BLER of every MCS in a table beside
    the trace, and pays for looking it up once, when the corpus is made; that time is in.
    """
    import torch

    from rankd_pipeline.ran_functions.link_adaptation.policies import OuterLoop
    from rankd_pipeline.ran_functions.link_adaptation.rollout import Traces, roll_out
    from rankd_pipeline.ran_functions.link_adaptation.tables import link_tables

    torch.set_num_threads(1)
    tables, (phy, outer) = link_tables((PRB,), SYMBOLS), _sionna()
    rng = np.random.default_rng(0)
    elements = torch.full((USERS,), PRB * 12 * SYMBOLS, dtype=torch.int32)

    def sinr_db(slots: int) -> np.ndarray:
        return (rng.uniform(2, 24, (USERS, 1)) + rng.normal(0, 3, (USERS, slots))).astype(np.float32)

    def ours(slots: int = 2000) -> float:
        sinr = sinr_db(slots)
        started = time.perf_counter()
        bler = tables.bler_at(sinr.ravel(), np.zeros(sinr.size, int)).reshape(USERS, slots, -1)
        cqi = np.searchsorted(tables.cqi_sinr_db_Q, sinr, side="right").clip(1) - 1
        traces = Traces(
            cqi_NT=cqi.astype(np.uint8), cqi_age_slots_NT=np.ones((USERS, slots), np.uint8), doppler_hz_N=np.full(USERS, 10.0),
            allocated_prb_N=np.full(USERS, PRB), harq_delay_N=np.ones(USERS, int), bler_NTM=bler,
            draw_NT=rng.random((USERS, slots), np.float32), step_slot_N=np.full(USERS, -1),
        )  # fmt: skip
        roll_out(traces, OuterLoop(tables, 0.1, 0.3))
        return USERS * slots / (time.perf_counter() - started)

    def plain(slots: int = 60) -> float:
        sinr = torch.from_numpy(10 ** (sinr_db(slots) / 10)).float()
        feedback = torch.full((USERS,), -1, dtype=torch.int32)
        started = time.perf_counter()
        for slot in range(slots):
            mcs = outer(elements, feedback, sinr[:, slot], mcs_table_index=2, mcs_category=1)
            _, feedback, *_ = phy(mcs, sinr_eff=sinr[:, slot], num_allocated_re=elements, mcs_table_index=2, mcs_category=1)
        return USERS * slots / (time.perf_counter() - started)

    a, b, ratio = alternate(ours, plain, 3)
    return [
        Row("slot loop of an outer loop, user slots/s", f"{a:,.0f}", f"{b:,.0f} (blocks of sionna.sys)", ratio, ">= 1", ratio >= 1)
    ]


def _sionna():
    """Sionna's PHY abstraction, with the MCS that its tables lack, and its outer loop on it."""
    import os

    import sionna.sys
    from sionna.sys import OuterLoopLinkAdaptation, PHYAbstraction

    from rankd_pipeline.ran_functions.link_adaptation.bler_extension import EXTENSION

    builtin = os.path.join(os.path.dirname(sionna.sys.__file__), "bler_tables", "PDSCH_table2.json")
    phy = PHYAbstraction(
        load_bler_tables_from=[builtin, str(EXTENSION)], snr_db_interp_min_max_delta=(-14.0, 32.05, 0.1), device="cpu"
    )
    return phy, OuterLoopLinkAdaptation(phy, USERS, bler_target=0.1, delta_up=0.3, device="cpu")


def student_call(hidden: int = 32) -> list[Row]:
    """One slot of the GRU student with its decision rule: generated C and onnxruntime against PyTorch eager, p50 back to back."""
    import torch

    from rankd_pipeline.ran_functions.link_adaptation.function import LinkAdaptation
    from rankd_pipeline.ran_functions.link_adaptation.head import UNTUNED
    from rankd_pipeline.runtime.c_export import generate_c
    from rankd_pipeline.runtime.latency import Candidate, LatencyConfig, profile
    from rankd_pipeline.runtime.onnx_export import export_onnx

    function = LinkAdaptation()
    config, network = function.corpus_config({}), {"kind": "gru", "hidden": hidden}
    torch.manual_seed(0)
    module = function.deployable(function.student(config, network), {"temperature": 1.0, **UNTUNED}).eval()
    signature = function.student_signature(config, network, 1000.0)
    samples, runs = _slots(signature), LatencyConfig(paced_runs=3000, winner_runs=5000, back_to_back_runs=5000, max_seconds=30)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        export_onnx(module, signature, work / "m.onnx", {})
        source = generate_c(work / "m.onnx", work / "g", "generated")
        race = profile(
            [Candidate(runtime="generated C", engine="c", path=work / "m.onnx", csource=source),
             Candidate(runtime="onnxruntime", engine="onnxruntime", path=work / "m.onnx")],
            signature, runs, samples, work / "race",
        )  # fmt: skip
    eager = eager_p50_us(module, samples)
    rows = []
    for item in race.candidates:
        if item.back_to_back is not None:
            ours = item.back_to_back.p50_us
            rows.append(
                Row("link adaptation, one slot, p50, us", f"{ours:.2f} ({item.runtime})", f"{eager:.0f} (PyTorch eager)",
                    ours / eager, "< 1", ours < eager)
            )  # fmt: skip
    return rows


def _slots(signature, n: int = 512) -> dict[str, np.ndarray]:
    """Reports of n slots as a base station has them."""
    rng = np.random.default_rng(0)
    ranges = {"cqi": (1, 15), "cqi_age_slots": (4, 40), "harq_ack": (0, 2), "harq_mask": (0, 2), "harq_mcs": (0, 28)}
    slots = {name: rng.integers(*span, n).astype(np.float32) for name, span in ranges.items()}
    slots |= {"doppler_hz": rng.uniform(1, 300, n), "allocated_prb": rng.choice([8.0, 24.0, 72.0], n)}
    slots |= {"bler_target": np.full(n, 0.1), "state": rng.normal(0, 0.3, (n, signature.inputs[-1].shape[0]))}
    return {name: values.astype(np.float32) for name, values in slots.items()}
