"""Writes `beam_drive_test.csv`: Sionna links logged as a drive-test tool would, with the faults that such logs have.

Run from the repository: `python data/samples/make_beam_drive_test.py`. The same seed gives the same file.
"""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa

from rankd_pipeline.ran_functions.beam_management.config import BeamCorpusConfig
from rankd_pipeline.ran_functions.beam_management.simulate import plan_shards, simulate_shard
from rankd_pipeline.store.tensors import column_array

SEED = 38901
SITES = ("old_town", "station", "ring_road", "riverside")  # riverside is held out
WEAKEST_DB = 22.0  # beams further below the best are not logged: the tool keeps its files small


def simulate() -> dict[str, np.ndarray]:
    """All links as columns, row by row in log order."""
    sites = [s for s in BeamCorpusConfig().sites if s.name in SITES]
    cfg = BeamCorpusConfig(
        sites=tuple(sites), seen_samples=1300, heldout_site_samples=360, heldout_band_samples=360, labelled_share=0.5
    )
    shards = [simulate_shard(cfg, shard) for shard in plan_shards(cfg, SEED)]
    features = pa.concat_tables([s.features for s in shards])
    truth = pa.concat_tables([s.truth for s in shards])
    table = {name: column_array(features[name]) for name in features.column_names}
    return table | {name: column_array(truth[name]) for name in truth.column_names}


def cell(value: float, digits: int = 0) -> str:
    """A number as the tool prints it."""
    return f"{value:.{digits}f}"


def row_of(c: dict[str, np.ndarray], i: int) -> dict[str, str]:
    """Row i as the tool writes it: MHz, m/s, ms, dBm; beams and the best beam counted from 1; nothing where nothing was found."""
    row = {
        "time_ms": cell(c["time_s"][i] * 1000),
        "run_id": f"R{c['drop_id'][i]:04d}",
        "site": c["site"][i],
        "area": {"UMi": "urban micro", "UMa": "urban macro"}[c["scenario"][i]],
        "carrier_mhz": cell(c["band_ghz"][i] * 1000),
        "speed_mps": cell(c["speed_kmh"][i] / 3.6, 2),
    }
    for beam, (value, there) in enumerate(zip(c["l1_rsrp_dbm"][i, -1], c["l1_rsrp_mask"][i, -1], strict=True)):
        row[f"ssb_{beam}_rsrp"] = cell(value) if there else ""
    row["best_beam"] = str(c["sweep_beam"][i] + 1) if c["labelled"][i] else ""
    row["two_stage_beam"] = str(c["hierarchical_beam"][i] + 1)
    row["indoor"], row["los"] = str(int(c["indoor"][i])), str(int(c["los"][i]))
    sweep = c["rsrp_set_a_dbm"][i]
    for beam, value in enumerate(sweep):
        logged = c["labelled"][i] and value > sweep.max() - WEAKEST_DB
        row[f"beam_{beam + 1}_rsrp"] = cell(value) if logged else ""
    return row


def plant_faults(rows: list[dict[str, str]], rng: np.random.Generator) -> list[dict[str, str]]:
    """What goes wrong in real logs: codes for "not measured", a tool that logs mW, gaps, damaged cells."""
    ssb = [name for name in rows[0] if name.startswith("ssb_")]
    for i in rng.choice(len(rows), 60, replace=False):  # an old firmware writes a code, not nothing
        for name in ssb:
            rows[i][name] = rows[i][name] or "-999"
    for i in rng.choice(len(rows), 12, replace=False):  # index 127 of the L1-RSRP table: no value
        rows[i][str(rng.choice(ssb))] = "127"
    start = int(rng.integers(100, 400))
    for row in rows[start : start + 48]:  # one laptop logged milliwatts
        for name in ssb:
            if row[name] not in ("", "-999", "127"):
                row[name] = f"{10 ** (float(row[name]) / 10):.2e}"
    lost = np.zeros(len(rows), bool)
    for at in rng.integers(0, len(rows) - 12, 5):  # the log was off
        lost[at : at + int(rng.integers(3, 12))] = True
    kept = [row for row, gone in zip(rows, lost, strict=True) if not gone]
    damaged = ((40, ssb[3], "ERR"), (333, "site", ""), (901, "speed_mps", "n/a"), (1210, ssb[0], "nan"))
    for i, name, text in damaged:
        kept[i][name] = text
    mislabelled = next(row for row in kept[700:] if row["best_beam"])
    mislabelled["best_beam"] = "65"
    return kept


def main() -> None:
    """Write the file beside this script."""
    columns = simulate()
    rows = plant_faults([row_of(columns, i) for i in range(len(columns["sample_id"]))], np.random.default_rng(SEED))
    path = Path(__file__).with_name("beam_drive_test.csv")
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        handle.write("12345,R0001,station\n")  # the battery died


if __name__ == "__main__":
    main()
