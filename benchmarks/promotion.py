"""Does the promotion rule ever let a worse model through? Seeded trials with planted challengers and exact binomial bounds.

`python -m benchmarks.promotion` draws sessions, who gets a label, and the paired row scores of champion and challenger; all of
that is synthetic. What is held back, whether the labels are a fair sample, and the decision are the real code: `roles_of`,
`alike` and `evaluation.challenge.decide`, under the rules of the pipeline's YAML. Writes
`benchmarks/results/drift_promotion.md`.
"""

import argparse
import datetime
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankd_pipeline.drift.statistics import alike, exact_bounds, mean_interval, session_table
from rankd_pipeline.evaluation.challenge import Decision, Evidence, decide
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.spec import PipelineSpec, load_pipeline
from rankd_pipeline.steps.shadow_run import rules_of
from rankd_pipeline.telemetry.roles import JUDGE, roles_of

RESULTS = Path(__file__).parent / "results"
ROWS_A_SESSION, FEATURES, DISAGREE = 10, 16, 0.25
GENERAL = 3000
"""Sessions of the general test set; a laptop corpus has about as many."""
REASONS = (
    "not proven better", "too few labels", "labelled sessions are unlike", "it may have forgotten", "its calls exceed",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """One planted trial.

    sessions: in the recent windows. labelled: share of them. gain: true mean gain of the challenger over all of them, on the
    general test set too if it is negative. by_kind: how much more it gains where the kind of user is one unit larger.
    bias: how the odds of a label grow with the kind of user; 0 is a fair sample.
    """

    sessions: int
    labelled: float
    gain: float
    by_kind: float = 0.0
    bias: float = 0.0


def worlds(what: str, rng: np.random.Generator) -> World:
    """A world of this kind, with its size, its labels and how far the models are apart drawn at random."""
    sessions = int(np.exp(rng.uniform(np.log(200), np.log(3000))))
    labelled = rng.uniform(0.1, 0.6)
    worse = -float(np.exp(rng.uniform(np.log(0.001), np.log(0.1))))
    match what:
        case "worse: noise":
            return World(sessions, labelled, worse)
        case "worse: too few labels":
            return World(sessions, float(rng.uniform(0, 25)) / sessions, worse)
        case "worse: biased labels":
            return World(sessions, labelled, worse, by_kind=float(rng.uniform(0.05, 0.2)), bias=float(rng.uniform(0.3, 3.0)))
        case "equal":
            return World(sessions, labelled, 0.0)
    return World(sessions, labelled, float(what.removeprefix("better by ")))


def trial(world: World, spec: PipelineSpec, seed: int) -> Decision:
    """Draw the world and decide, as the shadow run does."""
    rng = np.random.default_rng(seed)
    kind = rng.standard_normal(world.sessions)
    features = kind[:, None] * rng.uniform(0.2, 1.0, FEATURES) + rng.standard_normal((world.sessions, FEATURES))
    odds = world.labelled / (1 - world.labelled) * np.exp(world.bias * kind)
    has_label = np.repeat(rng.random(world.sessions) < odds / (1 + odds), ROWS_A_SESSION)
    session = np.repeat(np.arange(world.sessions), ROWS_A_SESSION)
    telemetry, shadow = spec.steps.telemetry, spec.steps.shadow_run
    judged = roles_of(session, has_label, telemetry.judge_share, telemetry.val_share, seed) == JUDGE
    mean = world.gain + world.by_kind * kind + rng.normal(0, 0.05, world.sessions)
    general = mean_interval(gains(np.full(GENERAL, min(world.gain, 0.0)), rng).reshape(GENERAL, -1).mean(axis=1))
    assert general is not None
    evidence = Evidence(
        gain=gains(mean, rng)[judged], session=session[judged], general=sum(general) / 2, general_ci95=general,
        label_bias_p=bias_p(features, has_label, session, seed), failed=0, late_p=1.0, look=1,
    )  # fmt: skip
    return decide(evidence, rules_of(shadow, load_function(spec.function).metric, champion=0.5))


def gains(mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Row gains in {-1, 0, 1}, `ROWS_A_SESSION` a session, that average to `mean` [sessions] where DISAGREE allows it."""
    up, down = (np.clip((DISAGREE + sign * mean) / 2, 0, 0.5)[:, None] for sign in (1, -1))
    draw = rng.random((len(mean), ROWS_A_SESSION))
    return np.where(draw < up, 1.0, np.where(draw > 1 - down, -1.0, 0.0)).reshape(-1)


def bias_p(features: np.ndarray, has_label: np.ndarray, session: np.ndarray, seed: int) -> float:
    """p that labelled sessions look like the others, as the shadow run asks it of the inputs."""
    if has_label.all() or not has_label.any():
        return 1.0
    rows = np.repeat(features, ROWS_A_SESSION, axis=0)
    tables = [session_table(list(rows[side].T), session[side]) for side in (~has_label, has_label)]
    return alike(tables[0], tables[1], seed)


def page(found: Mapping[str, Sequence[Decision]], pipeline: str) -> str:
    """The table as Markdown."""
    worse = [decision for what, decisions in found.items() if what.startswith("worse") for decision in decisions]
    lines = [
        "# Promotion decisions on planted challengers", "",
        f"`python -m benchmarks.promotion`, {datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}. "
        f"Rules of {pipeline}. Sessions, labels and paired scores are synthetic (200 to 3,000 sessions of {ROWS_A_SESSION} rows, "
        f"models that differ in {DISAGREE:.0%} of the rows; worse ones lose 0.001 to 0.1); what is held back, the test for biased "
        "labels and the decision are the real code. Bounds are exact binomial, 95 %.", "",
        f"- Worse models promoted: **{_share(worse)}**.",
        f"- Equal models promoted: **{_share(found['equal'])}**.", "",
        "| challenger | trials | promoted | refused because |", "|---|---|---|---|",
    ]  # fmt: skip
    for what, decisions in found.items():
        why = Counter(_reason(decision) for decision in decisions if not decision.promote)
        told = "; ".join(f"{reason} {count}" for reason, count in why.most_common())
        lines.append(f"| {what} | {len(decisions)} | {_share(decisions)} | {told} |")
    return "\n".join(lines) + "\n"


def _share(decisions: Sequence[Decision]) -> str:
    hits = sum(decision.promote for decision in decisions)
    low, high = exact_bounds(hits, len(decisions))
    return f"{hits} / {len(decisions)} [{low:.1%}, {high:.1%}]"


def _reason(decision: Decision) -> str:
    return next((reason for reason in REASONS if decision.reason.startswith(reason)), decision.reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="beam_management")
    parser.add_argument("--trials", type=int, default=300, help="of equal models, and of worse ones (a third of each kind)")
    options = parser.parse_args()
    spec = load_pipeline(options.pipeline).at()
    third = options.trials // 3
    plan = {
        "worse: noise": third, "worse: too few labels": third, "worse: biased labels": options.trials - 2 * third,
        "equal": options.trials, "better by 0.02": third, "better by 0.05": third, "better by 0.1": third,
    }  # fmt: skip
    found = {}
    for at, (what, count) in enumerate(plan.items()):
        seeds = [31_000_000 + 100_000 * at + number for number in range(count)]
        found[what] = [trial(worlds(what, np.random.default_rng([seed, 1])), spec, seed) for seed in seeds]
    RESULTS.mkdir(exist_ok=True)
    text = page(found, options.pipeline)
    (RESULTS / "drift_promotion.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
