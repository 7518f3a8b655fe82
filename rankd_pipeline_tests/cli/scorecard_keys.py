"""The keys of `rankd report --json`, spelt out once more from the specification, so that the code cannot agree with itself."""

KEYS: dict[str, object] = {
    "function": None,
    "scale": None,
    "metric": dict.fromkeys(("name", "unit", "higher_is_better")),
    "teacher": {
        **dict.fromkeys(("params", "score", "score_ci95", "gap_site", "gap_band", "verdict")),
        "baseline": dict.fromkeys(("name", "score")),
        "calibration": dict.fromkeys(("metric", "value", "raw")),
    },
    "student": dict.fromkeys(
        ("params", "score", "score_ci95", "retention", "gain_retention", "scratch_score", "kd_gain", "kd_p", "dark_gain",
         "temperature", "verdict")
    ),
    "quantized": dict.fromkeys(("score", "drop", "bytes_fp32", "bytes_int8")),
    "latency": dict.fromkeys(
        ("budget_us", "runtime", "p50_us", "p99_us", "p999_us", "max_us", "control_p999_us", "verdict", "cases", "candidates")
    ),
    "deployment": dict.fromkeys(("version", "alias", "bundle")),
    "seconds": None,
}  # fmt: skip
