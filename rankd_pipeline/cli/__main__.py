"""`python -m rankd_pipeline.cli`: the `rankd` command where its script is not on the PATH."""

from rankd_pipeline.cli import main

main()
