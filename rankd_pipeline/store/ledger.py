"""The append-only ledger of a pipeline: which bundle was registered, which one serves, since when and why."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from rankd_pipeline.errors import RankdError

Event = Literal["registered", "champion", "refused"]


@dataclass(frozen=True)
class Entry:
    """One line. version counts the registered bundles of the pipeline from 1; score is on the named test data."""

    event: Event
    version: int
    recipe: str
    bundle: str
    scale: str
    score: float | None
    test_data: str
    reason: str
    run_id: str | None
    time: float


class Ledger:
    """`<folder>/<pipeline>.jsonl`: one JSON object a line, each line written with one write and synced."""

    def __init__(self, folder: Path, pipeline: str) -> None:
        self.path = folder / f"{pipeline}.jsonl"
        self._lock = FileLock(folder / f".{pipeline}.lock")
        folder.mkdir(parents=True, exist_ok=True)

    def entries(self) -> list[Entry]:
        """All whole lines, oldest first. A last line cut off by a power failure is no entry.

        Raises: RankdError naming a damaged line before the last.
        """
        if not self.path.exists():
            return []
        text = self.path.read_text(errors="replace")
        lines = text.split("\n")[:-1]
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entries.append(Entry(**json.loads(line)))
            except (ValueError, TypeError):
                raise RankdError(f"{self.path}, line {number}: not a ledger entry; restore the file from a copy.") from None
        return entries

    def champion(self) -> Entry | None:
        """Who serves now."""
        return next((entry for entry in reversed(self.entries()) if entry.event == "champion"), None)

    def registered(self, recipe: str) -> Entry | None:
        """The registration of the deployment with this recipe."""
        return next((entry for entry in self.entries() if entry.event == "registered" and entry.recipe == recipe), None)

    def register(self, recipe: str, bundle: str, scale: str, score: float | None, test_data: str, run_id: str | None) -> Entry:
        """Register a bundle once; a second call with the same recipe returns the first entry."""
        with self._lock:
            known = self.registered(recipe)
            if known is not None:
                return known
            version = max((entry.version for entry in self.entries()), default=0) + 1
            entry = Entry("registered", version, recipe, bundle, scale, score, test_data, "deployed", run_id, time.time())
            return self._append(entry)

    def decide(self, registered: Entry, event: Event, reason: str) -> Entry:
        """Record that a registered version became champion or was refused, once."""
        with self._lock:
            last = [entry for entry in self.entries() if entry.version == registered.version and entry.event != "registered"]
            if last and last[-1].event == event:
                return last[-1]
            return self._append(Entry(**{**asdict(registered), "event": event, "reason": reason, "time": time.time()}))

    def _append(self, entry: Entry) -> Entry:
        # A line that a power failure cut short is dropped first, so that it cannot swallow this one.
        data = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("ab") as handle:
            handle.truncate(data.rfind(b"\n") + 1)
            handle.write((json.dumps(asdict(entry), sort_keys=True) + "\n").encode())
            handle.flush()
            os.fsync(handle.fileno())
        return entry
