"""Which registered bundle serves: the decision after a deployment, written to the ledger."""

from collections.abc import Callable

from rankd_pipeline.errors import RankdError
from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import concat_tables, read_table
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.bundle import verify_bundle
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.steps.runner import resolve, run_with_inputs
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.store.ledger import SERVES, Entry, Ledger, open_ledger

SHIPPED = "shipped"


def promote(spec: PipelineSpec, artifact: Artifact, store: Store, current: Settings, run_id: str | None) -> Entry:
    """Register a deployment and say whether it serves from now on; the second call for the same one changes nothing.

    A re-distilled one waits for its shadow run, which decides (`challenge`).

    It becomes champion if it may be deployed (not smoke scale) and there is no champion, or if it is better than the
    champion on the same test data. Where the test data differ the two cannot be compared: the champion stays.
    """
    ledger = open_ledger(current, spec.pipeline)
    metrics = artifact.metrics
    entry = ledger.register(
        artifact.recipe, str(artifact.path / "bundle"), spec.scale, metrics["score"], metrics["test_data"], run_id
    )  # fmt: skip
    decided = [item for item in ledger.entries() if item.version == entry.version and item.event != "registered"]
    if decided:
        return decided[-1]
    if not spec.enforced:
        return ledger.decide(entry, "refused", f"{spec.scale} scale: a trial, not deployable")
    champion = ledger.champion()
    if champion is None:
        return ledger.decide(entry, "champion", "the first deployable version", verify_bundle)
    if spec.site is not None:
        return entry
    if champion.test_data != entry.test_data:
        return ledger.decide(entry, "refused", f"judged on other test data than champion v{champion.version}: not comparable")
    better, sentence = _better(spec, artifact, champion, store)
    return ledger.decide(entry, "champion" if better else "refused", sentence, verify_bundle)


def challenge(
    spec: PipelineSpec, store: Store, current: Settings, run_id: str | None, note: Callable[[str], None] = print
) -> tuple[Artifact, Entry]:
    """Run the re-distilled deployment of `spec` in shadow beside the champion, and promote or refuse it; once.

    Raises: RankdError if there is no champion to compare it with, or it changed meanwhile.
    """
    ledger = open_ledger(current, spec.pipeline)
    inputs = {name: resolve(name, spec, store) for name in ("deployment", "corpus")}
    deployment, corpus = inputs["deployment"], inputs["corpus"]
    champion = ledger.champion()
    if spec.site is None or deployment is None or corpus is None or champion is None:
        raise RankdError(f"{spec.pipeline}/shadow_run: no re-distilled deployment and champion to compare; run the job redistill.")
    entry = ledger.register(
        deployment.recipe, str(deployment.path / "bundle"), spec.scale, deployment.metrics["score"],
        deployment.metrics["test_data"], run_id,
    )  # fmt: skip
    look = ledger.look()
    decided = [item for item in ledger.entries() if item.version == entry.version and item.event != "registered"]
    if decided:  # made again after a kill: what was compared then is compared now
        champion, look = _compared_with(ledger, decided[0])
    serving = store.get(spec.pipeline, "deployment", champion.recipe)
    telemetry = store.get(spec.pipeline, "telemetry", spec.site.telemetry)
    if serving is None or telemetry is None:
        raise RankdError(
            f"{spec.pipeline}/shadow_run: the champion v{champion.version} or the telemetry is no longer in the store."
        )
    given = {"windows": [list(window) for window in spec.site.windows], "look": look}
    artifact = run_with_inputs(
        "shadow_run", spec, {"deployment": deployment, "champion": serving, "corpus": corpus, "telemetry": telemetry},
        store, current, run_id, note, given,
    )  # fmt: skip
    if decided:
        return artifact, decided[-1]
    metrics = artifact.metrics
    if not spec.enforced:
        return artifact, ledger.decide(entry, "refused", f"{spec.scale} scale: a trial, not deployable ({metrics['reason']})")
    event = "champion" if metrics["promote"] else "refused"
    return artifact, ledger.decide(entry, event, metrics["reason"], verify_bundle, against=champion)


def _compared_with(ledger: Ledger, decided: Entry) -> tuple[Entry, int]:
    """The champion and the look at the time of a decision."""
    entries = ledger.entries()
    at = entries.index(decided)
    champion = next(number for number in range(at - 1, -1, -1) if entries[number].event in SERVES)
    refused = [item for item in entries[champion + 1 : at] if item.event == "refused" and item.scale != "smoke"]
    return entries[champion], 1 + len(refused)


def _better(spec: PipelineSpec, challenger: Artifact, champion: Entry, store: Store) -> tuple[bool, str]:
    """Paired on the same test samples: the challenger serves only if the whole 95 % interval of its gain is above zero."""
    metric = load_function(spec.function).metric
    serving = store.get(spec.pipeline, "deployment", champion.recipe)
    if serving is None:
        return False, f"champion v{champion.version} is no longer in the store, so nothing can be compared with it"
    tables = []
    for name, artifact in (("challenger", challenger), ("champion", serving)):
        table = read_table(artifact.file("evaluation.parquet"))
        tables.append(table[table["model"] == SHIPPED].assign(model=name))
    sign = 1.0 if metric.higher_is_better else -1.0
    gain = estimate(
        concat_tables(tables), "challenger@test", ["champion@test"], metric=metric.name, aggregate=metric.aggregate,
        higher_is_better=metric.higher_is_better,
    )  # fmt: skip
    low, high = sorted(sign * value for value in gain.ci95) if gain.ci95 else (float("-inf"), float("inf"))
    text = f"{metric.name} {sign * gain.value:+.4f} (95 % {low:+.4f} to {high:+.4f}) against champion v{champion.version}"
    return low > 0, f"better: {text}" if low > 0 else f"not proven better: {text}"
