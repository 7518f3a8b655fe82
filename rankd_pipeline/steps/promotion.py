"""Which registered bundle serves: the decision after a deployment, written to the ledger."""

from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import concat_tables, read_table
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.runtime.bundle import verify_bundle
from rankd_pipeline.settings import Settings
from rankd_pipeline.spec import PipelineSpec
from rankd_pipeline.store.artifact import Artifact, Store
from rankd_pipeline.store.ledger import Entry, open_ledger

SHIPPED = "shipped"


def promote(spec: PipelineSpec, artifact: Artifact, store: Store, current: Settings, run_id: str | None) -> Entry:
    """Register a deployment and say whether it serves from now on; the second call for the same one changes nothing.

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
    if champion.test_data != entry.test_data:
        return ledger.decide(entry, "refused", f"judged on other test data than champion v{champion.version}: not comparable")
    better, sentence = _better(spec, artifact, champion, store)
    return ledger.decide(entry, "champion" if better else "refused", sentence, verify_bundle)


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
