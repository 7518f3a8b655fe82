"""What the commands share: the terminal that tables go to (not cut at 80 columns in a pipe or a log), and the scales."""

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200
# Kept here so that --help needs no pydantic; a test holds it equal to spec.SCALES.
SCALE = click.Choice(["smoke", "laptop", "gpu"])


def console() -> "Console":
    """rich's console on stdout, made anew, so that it follows a redirected stdout."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
