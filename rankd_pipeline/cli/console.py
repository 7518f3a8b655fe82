"""The terminal that tables and trees are printed to; in a pipe or a log they are not cut at 80 columns."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200


def console() -> "Console":
    """rich's console on stdout, made anew, so that it follows a redirected stdout."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
