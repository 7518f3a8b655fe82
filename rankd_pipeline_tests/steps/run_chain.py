"""Runs a chain's steps in this process, as a test wants to kill it: python -m rankd_pipeline_tests.steps.run_chain SCALE."""

import sys

from rankd_pipeline.settings import prepare_environment
from rankd_pipeline.spec import load_pipeline
from rankd_pipeline.steps.chain import STEPS
from rankd_pipeline.steps.runner import open_store, run_step

if __name__ == "__main__":
    current = prepare_environment()
    for name in STEPS:
        run_step(name, load_pipeline("beam_management").at(sys.argv[1]), open_store(current), current)
