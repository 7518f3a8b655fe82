"""The Dagster component behind `type: rankd_pipeline.orchestration.component.RanFunctionComponent`: one YAML, one pipeline."""

from pathlib import Path
from typing import Any

import dagster as dg

from rankd_pipeline.errors import RankdError
from rankd_pipeline.orchestration.assets import build_pipeline
from rankd_pipeline.spec import PipelineConfig, pipeline_files, validated


class PipelineScaffolder(dg.Scaffolder):
    """`dg scaffold defs …RanFunctionComponent NAME` starts from a whole, commented pipeline instead of an empty one."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        request.target_path.mkdir(parents=True, exist_ok=True)
        template = next(iter(pipeline_files().values())).read_text()
        name = request.target_path.name
        lines = [f"  pipeline: {name}" if line.startswith("  pipeline:") else line for line in template.splitlines()]
        (request.target_path / "defs.yaml").write_text("\n".join(lines) + "\n")


@dg.scaffold_with(PipelineScaffolder)
class RanFunctionComponent(dg.Component, dg.Model, dg.Resolvable):
    """A RAN function's chain from corpus to deployment. The attributes are those of `spec.PipelineConfig`."""

    pipeline: str
    function: str
    title: str = ""
    owners: list[str] = []
    steps: dict[str, Any]
    scales: dict[str, Any] = {}
    variants: dict[str, Any] = {}
    gates: dict[str, Any] = {}
    targets: list[dict[str, Any]] = []
    ablation: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    sensors: dict[str, Any] = {}
    redistill: dict[str, Any] = {}

    def config(self) -> PipelineConfig:
        """The validated configuration. Raises: RankdError naming the key that is wrong."""
        return validated(PipelineConfig, self.model_dump(), f"pipeline {self.pipeline}")

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        folder = Path(context.path).name
        config = self.config()
        if folder != config.pipeline and Path(context.path).parent.name == "defs":
            raise RankdError(f"{context.path}: the folder {folder!r} holds the pipeline {config.pipeline!r}; rename one of them.")
        return build_pipeline(config)
