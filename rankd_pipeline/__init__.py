"""rankd: distil large RAN networks into small ones that fit a radio time budget, as Dagster assets."""

__version__ = "0.1.0"
