"""The channel prediction teacher of a run beside the rules without a network, before the learned baselines are fitted.

    python -m benchmarks.channel_teacher [--scale laptop] [--every 3]

Reads corpus and teacher from the store (`rankd run channel_prediction` makes them, whether or not a gate stops it later).
"""

import argparse
import json

from rankd_pipeline.evaluation.bootstrap import estimate
from rankd_pipeline.evaluation.table import concat_tables
from rankd_pipeline.ran_functions.registry import load_function
from rankd_pipeline.settings import prepare_environment
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.data import evaluation_data, features_of, present_splits, split_is
from rankd_pipeline.steps.runner import open_store, resolve
from rankd_pipeline.steps.teacher import WEIGHTS
from rankd_pipeline.training.weights import load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--every", type=int, default=1, help="take every n-th test sample")
    arguments, current = parser.parse_args(), prepare_environment()
    spec = load_pipeline("channel_prediction").at(arguments.scale)
    store, function = open_store(current), load_function("channel_prediction")
    corpus, teacher = resolve("corpus", spec, store), resolve("teacher", spec, store)
    if corpus is None or teacher is None:
        raise SystemExit(f"no teacher at scale {spec.scale} yet: rankd run channel_prediction --scale {spec.scale}")
    cfg = function.corpus_config(spec.steps.corpus.simulation)
    network = function.teacher(cfg, spec.steps.teacher.network)
    load_weights(network, teacher.file(WEIGHTS))
    train, val = (features_of(corpus, ["csi", "grid", "task", "site"], split_is(split)) for split in ("train", "val"))
    models = {"teacher": function.network_predictor(network.eval(), {"radius": 0.0})}
    models |= {item.name: item.fit(train, val, 0) for item in function.baselines(cfg) if not item.learned}
    splits, tables = present_splits(corpus), []
    for split in splits:
        features, truth = evaluation_data(function, corpus, split)
        some = [{name: values[:: arguments.every] for name, values in columns.items()} for columns in (features, truth)]
        tables.append(function.evaluate(models, *some, split, frozenset({"teacher"})))
    table, metric = concat_tables(tables), function.metric
    for split in splits:
        for task in ("time", "frequency"):
            found = {
                name: estimate(table, f"{name}@{split}", metric=metric.name, aggregate=metric.aggregate, where={"task": task},
                               higher_is_better=False, resamples=300)
                for name in models
            }  # fmt: skip
            row = {name: [round(item.value, 2), *(round(x, 2) for x in item.ci95 or ())] for name, item in found.items()}
            print(json.dumps({"split": split, "task": task, "nmse_db": row}))


if __name__ == "__main__":
    main()
