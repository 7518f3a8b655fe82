"""What every step of every pipeline shares: scale, seed and variant (once, in the Launchpad), and MLflow."""

from typing import Literal

import dagster as dg
from pydantic import Field

from rankd_pipeline.settings import settings
from rankd_pipeline.spec import PipelineConfig, PipelineSpec, SiteData
from rankd_pipeline.tracking.mlflow import Tracker


class RankdRun(dg.ConfigurableResource):
    """What a run computes; part of every recipe, tag and bundle."""

    scale: Literal["smoke", "laptop", "gpu"] = Field(
        "laptop", description="smoke: seconds, gates shown only. laptop: minutes on 2 cores. gpu: as large as it still gains."
    )
    seed: int = Field(0, description="Seed of the simulation and of every training; same seed, same machine, same digests.")
    variant: str = Field("default", description="A named set of overrides in the pipeline's defs.yaml, under `variants`.")

    def spec(self, config: PipelineConfig, site: SiteData | None = None) -> PipelineSpec:
        """The effective configuration. Raises: RankdError for a variant that the pipeline does not have."""
        return config.at(self.scale, self.seed, self.variant, site)


class MlflowTracking(dg.ConfigurableResource):
    """MLflow, where one is reachable: one run per trained model, one registered model per pipeline."""

    uri: str = Field("", description="Tracking URI; empty: RANKD_MLFLOW_URI, or the database in the home.")

    def tracker(self) -> Tracker:
        """The tracker of this home."""
        return Tracker(self.uri or settings().mlflow_uri, settings().mlflow_dir)


def common() -> dg.Definitions:
    """Resources and executor, the same for every pipeline."""
    from rankd_pipeline.orchestration.executor import chain_executor

    resources = {"rankd": RankdRun(scale="laptop", seed=0, variant="default"), "mlflow": MlflowTracking(uri="")}
    return dg.Definitions(resources=resources, executor=chain_executor)
