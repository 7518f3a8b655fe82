"""What a person sees while a chain runs: a line per step, live in a terminal, plain lines in a pipe or a log."""

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankd_pipeline.progress import read_progress

if TYPE_CHECKING:
    from rich.table import Table

    from rankd_pipeline.orchestration.execute import StepEvent

PLAIN_EVERY_S = 15.0
MARKS = {"waiting": "·", "running": "…", "done": "✓", "cached": "=", "failed": "✗"}


@dataclass
class Row:
    """One step on the screen."""

    state: str = "waiting"
    text: str = ""
    done: float = 0.0
    total: float = 0.0
    seconds: float = 0.0
    since: float = 0.0

    @property
    def share(self) -> float | None:
        """Share of the work done, 0..1; None while the step has not said how much there is."""
        return min(self.done / self.total, 1.0) if self.total > 0 else None


class Board:
    """The state of every step, fed by Dagster's events and the steps' progress files."""

    def __init__(self, pipeline: str, steps: Sequence[str], folder: Path) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.rows = {step: Row() for step in steps}
        self.notes: list[str] = []

    def note(self, event: "StepEvent") -> bool:
        """Take one event in; False if it says nothing that a person wants to know."""
        if event.state == "note" and event.text.startswith("Dependencies for step"):
            return False  # Dagster, on every step behind a failed one
        row = self.rows.get(event.step)
        if row is None:
            self.notes.append(event.text)
        elif event.state == "started":
            row.state, row.since, row.text = "running", time.monotonic(), ""
        elif event.state in ("done", "cached"):
            row.state, row.seconds, row.text = event.state, event.seconds, ""
        elif event.state == "failed":
            row.state, row.text = "failed", ""
        elif event.state == "gate":
            row.text = event.text.partition(". ")[0].rpartition(": ")[2]  # the figures stand in the scorecard at the end
        else:
            self.notes.append(f"{event.step}: {event.text}")
        return True

    def refresh(self) -> None:
        """Read the progress files; a step that another process makes shows here too."""
        for state in read_progress(self.folder, self.pipeline):
            row = self.rows.get(state["step"])
            if row is not None and row.state == "running":
                row.done, row.total, row.text = state["done"], state["total"], state["text"]


@contextmanager
def watched(pipeline: str, steps: Sequence[str], folder: Path) -> "Iterator[Callable[[StepEvent], None]]":
    """A callback for step events that draws them until the block ends."""
    board = Board(pipeline, steps, folder)
    screen = _Live(board) if sys.stdout.isatty() else _Plain(board)
    with screen:
        yield screen.note


class _Screen(ABC):
    """Redraws from a thread of its own, because the main thread waits for the run."""

    period_s = 0.25

    def __init__(self, board: Board) -> None:
        self.board = board
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> "_Screen":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self.period_s):
            with self._guard:
                self.board.refresh()
                self.draw()

    def note(self, event: "StepEvent") -> None:
        with self._guard:
            if self.board.note(event):
                self.told(event)

    @abstractmethod
    def draw(self) -> None:
        """Show the board as it is now."""

    def told(self, event: "StepEvent") -> None:  # noqa: B027  (a screen that only draws has nothing to add)
        """React to one event."""


class _Live(_Screen):
    """A table that is redrawn in place."""

    def __enter__(self) -> "_Live":
        from rich.live import Live

        self._live = Live(self._table(), auto_refresh=False)
        self._live.start()
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self.draw()
        self._live.stop()

    def draw(self) -> None:
        self._live.update(self._table(), refresh=True)

    def told(self, event: "StepEvent") -> None:
        self.draw()

    def _table(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
        colours = {"done": "green", "cached": "cyan", "failed": "bold red", "running": "yellow"}
        for step, row in self.board.rows.items():
            bar: Any = ""
            if row.state == "running" and row.share is not None:
                bar = ProgressBar(total=1.0, completed=row.share, width=24)
            style = colours.get(row.state, "dim")
            table.add_row(Text(MARKS[row.state], style), Text(step, style), bar, _figures(row))
        for note in self.board.notes[-3:]:
            table.add_row("", "", "", Text(note, "dim"))
        return table


class _Plain(_Screen):
    """One line when something happens, and one every quarter of a minute while a step works."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        self._last = time.monotonic()

    def draw(self) -> None:
        if time.monotonic() - self._last < PLAIN_EVERY_S:
            return
        for step, row in self.board.rows.items():
            if row.state == "running":
                self._line(f"{step}: {_figures(row)}")

    def told(self, event: "StepEvent") -> None:
        row = self.board.rows.get(event.step)
        if row is None or event.state == "note":
            self._line(self.board.notes[-1])
        elif event.state == "started":
            self._line(f"{event.step}: started")
        elif event.state in ("done", "cached"):
            self._line(f"{event.step}: {_figures(row)}")
        elif event.state == "gate":
            self._line(f"{event.step}: {row.text}")

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        click.echo(text)


def _figures(row: Row) -> str:
    if row.state == "done":
        return f"{row.seconds:.1f} s" + (f"  {row.text}" if row.text else "")
    if row.state == "cached":
        return "stored" + (f"  {row.text}" if row.text else "")
    if row.state != "running":
        return row.text
    share = "" if row.share is None else f"{row.share:.0%} "
    return f"{share}{row.text} ({time.monotonic() - row.since:.0f} s)".strip()
