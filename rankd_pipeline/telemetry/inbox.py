"""The telemetry folder of a pipeline: which files are finished, which are set aside and why, and what has been taken in.

`<home>/telemetry/<pipeline>/*.parquet` is append-only: whoever writes there adds files and never edits one. A file is
taken in once; `.inbox.json` remembers it by content. What cannot be used is moved to `.quarantine/` beside a sentence.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankd_pipeline.errors import RankdError
from rankd_pipeline.store.artifact import sha256_file
from rankd_pipeline.telemetry.contract import TelemetrySchema, Unusable, read_file

RECORD, QUARANTINE = ".inbox.json", ".quarantine"
MAGIC = b"PAR1"
ABANDONED_S = 600.0
"""A file without a footer that has not changed for so long was left by a writer that died."""
MAX_BYTES = 512_000_000


@dataclass(frozen=True)
class Taken:
    """A file that was taken in: its content, and what is in it. first_s, last_s: seconds since 1970."""

    sha256: str
    bytes: int
    mtime_ns: int
    rows: int
    labelled: int
    left_out: int
    first_s: float
    last_s: float


@dataclass
class Intake:
    """What one look into the folder brought. new and set_aside are of this look; waiting are not finished yet."""

    files: dict[str, Taken] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    set_aside: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    other: int = 0


class Inbox:
    """The folder and its record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # -- light: what a sensor asks ----------------------------------------------------------------------------------
    def record(self) -> dict[str, Any]:
        """{files: {name: Taken}, telemetry: recipe of the artifact that was made of them, drift_report: likewise}."""
        try:
            found = json.loads((self.folder / RECORD).read_text())
        except FileNotFoundError:
            found = {}
        except ValueError:
            raise RankdError(
                f"{self.folder / RECORD}: damaged; delete it, then every file is taken in again (that is safe)."
            ) from None
        return {"files": {}, "telemetry": None, "drift_report": None, **found}

    def note(self, **changes: Any) -> None:
        """Change the record by one rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{RECORD}.{os.getpid()}"
        temporary.write_text(json.dumps({**self.record(), **changes}, sort_keys=True))
        temporary.replace(self.folder / RECORD)

    def unseen(self) -> list[str]:
        """Names of finished (or long abandoned) files that are not in the record as they are now; opens at most their ends."""
        known = self.record()["files"]
        return [
            path.name for path in self._candidates() if not _as_known(path, known.get(path.name)) and state_of(path) != "writing"
        ]

    # -- taking in ----------------------------------------------------------------------------------------------------
    def take(self, schema: TelemetrySchema, latest_s: float, note: Callable[[str], None] = lambda text: None) -> Intake:
        """Look at every file once: take in what is usable, set aside what is not. Nothing is recorded yet.

        latest_s: rows later than this are from a clock that is wrong.
        """
        known = self.record()["files"]
        result = Intake(other=self._others())
        contents: dict[str, str] = {}
        for path in self._candidates():
            before = known.get(path.name)
            if before is not None and _as_known(path, before):
                result.files[path.name] = Taken(**before)
                contents[before["sha256"]] = path.name
        for path in self._candidates():
            if path.name in result.files:
                continue
            state = state_of(path)
            if state == "writing":
                result.waiting.append(path.name)
                continue
            try:
                taken = self._read(path, state, known.get(path.name), contents, schema, latest_s)
            except FileNotFoundError:
                continue  # its owner took it away
            except Unusable as reason:
                self._set_aside(path, str(reason))
                result.set_aside[path.name] = str(reason)
                note(f"{path.name}: set aside, {reason}")
                continue
            contents[taken.sha256] = path.name
            result.files[path.name] = taken
            result.new.append(path.name)
        return result

    def _read(
        self, path: Path, state: str, before: Mapping[str, Any] | None, contents: Mapping[str, str], schema: TelemetrySchema,
        latest_s: float,
    ) -> Taken:  # fmt: skip
        if state == "rubbish":
            raise Unusable("not a Parquet file: it does not begin like one")
        if state == "abandoned":
            raise Unusable(f"no Parquet footer, and unchanged for over {ABANDONED_S / 60:.0f} minutes: its writer died")
        stat = path.stat()
        if stat.st_size > MAX_BYTES:
            raise Unusable(f"{stat.st_size / 1e6:.0f} MB; write files of at most {MAX_BYTES / 1e6:.0f} MB")
        digest = sha256_file(path)
        if before is not None and before["sha256"] != digest:
            raise Unusable("changed after it was taken in; telemetry is append-only: write a new file instead")
        if digest in contents:
            raise Unusable(f"the same content as {contents[digest]}")
        columns, left_out = read_file(path, schema)
        first, last = float(columns["time_s"].min()), float(columns["time_s"].max())
        if last > latest_s:
            raise Unusable(f"rows from {last - latest_s:.0f} s after now: the clock of its writer, or of this host, is wrong")
        return Taken(
            digest, stat.st_size, stat.st_mtime_ns, len(columns["time_s"]), int(columns["has_label"].sum()), left_out, first, last
        )

    def commit(self, intake: Intake, telemetry: str) -> None:
        """Record what was taken in, and the artifact that holds it: a rename, the last thing that happens."""
        self.note(files={name: asdict(taken) for name, taken in sorted(intake.files.items())}, telemetry=telemetry)

    # -- the folder -----------------------------------------------------------------------------------------------------
    def _candidates(self) -> list[Path]:
        found = self.folder.glob("[!._]*.parquet") if self.folder.is_dir() else ()
        return sorted(path for path in found if path.is_file())

    def _others(self) -> int:
        """Entries that are no telemetry by their name."""
        if not self.folder.is_dir():
            return 0
        names = {path.name for path in self._candidates()}
        return sum(not path.name.startswith(".") and path.name not in names for path in self.folder.iterdir())

    def _set_aside(self, path: Path, reason: str) -> None:
        folder = self.folder / QUARANTINE
        folder.mkdir(exist_ok=True)
        target = folder / path.name
        for number in range(1, 10_000):
            if not target.exists():
                break
            target = folder / f"{path.stem}-{number}{path.suffix}"
        target.with_name(f"{target.name}.reason.txt").write_text(f"{reason}\n")
        path.rename(target)


def quarantined(folder: Path) -> dict[str, str]:
    """Every file that was ever set aside, with its reason."""
    reasons = sorted((folder / QUARANTINE).glob("*.reason.txt"))
    return {path.name.removesuffix(".reason.txt"): path.read_text().strip() for path in reasons}


def state_of(path: Path, now: float | None = None) -> str:
    """finished (it has its footer), writing, abandoned (no footer, and long unchanged) or rubbish (no Parquet at all)."""
    try:
        with path.open("rb") as handle:
            head = handle.read(4)
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(size - 4, 0))
            whole = size >= 12 and head == MAGIC and handle.read(4) == MAGIC
        age = (now if now is not None else time.time()) - path.stat().st_mtime
    except OSError:
        return "writing"
    if whole:
        return "finished"
    # A negative age (the clock was set back) says nothing: such a file waits until time has passed it.
    if head and head != MAGIC[: len(head)]:
        return "rubbish"
    return "abandoned" if age > ABANDONED_S else "writing"


def _as_known(path: Path, known: Mapping[str, Any] | None) -> bool:
    if known is None:
        return False
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (known["bytes"], known["mtime_ns"])
