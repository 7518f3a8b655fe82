"""Step 7: the calibrated teacher over the full corpus, unlabelled samples included; stored, so that it runs once."""

import pyarrow as pa

from rankd_pipeline.distillation.distiller import DistillationConfig
from rankd_pipeline.distillation.heads import outputs_of
from rankd_pipeline.steps.data import FEATURES, as_trained
from rankd_pipeline.steps.runner import StepContext
from rankd_pipeline.steps.teacher import load_teacher
from rankd_pipeline.store.tensors import column_array, iter_tables, shards, tensor_array, write_parquet

SOFT = "soft_labels"


def soft_labels(ctx: StepContext) -> None:
    """Write `soft_labels/part-*.parquet` (sample_id, teacher [...] float16: what the head stores of the calibrated outputs).

    float16 halves the largest table of the chain; its rounding (2^-11 relative) is far below the label noise.
    """
    if DistillationConfig.model_validate(ctx.spec.steps.student.distillation).online:
        return ctx.skip("the teacher runs beside the student, on what it sees in that very step (steps.student.distillation)")
    model, head = load_teacher(ctx), ctx.function.head()
    calibration = ctx.inputs["calibration_scorecard"].metrics["calibration_parameters"]
    corpus = ctx.inputs["corpus"]
    total, passes = len(shards(corpus.file(FEATURES))), 0
    for index, table in enumerate(iter_tables(corpus.file(FEATURES), ["sample_id", "split", *ctx.function.feature_columns])):
        features = as_trained(corpus, {name: column_array(table[name]) for name in table.column_names})
        outputs = outputs_of(model, ctx.function.model_inputs(features), ctx.config.batch)
        soft = head.stored(outputs, calibration)
        write_parquet(
            pa.table({"sample_id": table["sample_id"].combine_chunks(), "teacher": tensor_array(soft)}),
            ctx.out / SOFT / f"part-{index:05d}.parquet",
        )
        passes += len(soft)
        ctx.progress(index + 1, total, "shards")
    ctx.metrics.update(samples=passes, teacher_passes=passes)
    return None
