"""The append-only ledger of a pipeline and the bundle that serves by it: both change by one rename.

`<folder>/<pipeline>` is a symbolic link to the current state, and a state is never edited:

    <pipeline> -> .<pipeline>/000007      the stable path; whoever reads resolves it once and sees one state
    .<pipeline>/000007/ledger.jsonl       every line there ever was, and one more than in 000006
    .<pipeline>/000007/bundle -> ../bundles/v0002-1f6feb00…
    .<pipeline>/bundles/v0002-1f6feb00…   a bundle that serves or served, whole, apart from the store

A new state is written and synced beside the old one, then the link is replaced. A kill at any moment leaves the old
state or the new one, never a ledger that says one thing while the other bundle is read.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import Settings
from rankd_pipeline.store.artifact import sync_path

Event = Literal["registered", "champion", "refused", "rollback"]
SERVES: tuple[Event, ...] = ("champion", "rollback")
"""Events after which the entry's version serves."""
LEDGER, BUNDLE, BUNDLES, MIRRORS = "ledger.jsonl", "bundle", "bundles", "mirrors.json"
MIRROR_NAMES = ("MLflow alias", "Dagster asset")
KEEP_STATES = 32
"""States kept for whoever is still reading one, and as copies of the ledger: a few kilobytes each. A reader on a loaded host that
followed the link may sleep through several promotions before it reads on."""

Check = Callable[[Path], Any]


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


@dataclass(frozen=True)
class Service:
    """One period in which a version served; until is None while it does. until may lie before since if the clock was set back."""

    entry: Entry
    since: float
    until: float | None


class Ledger:
    """The ledger of one pipeline under `folder` (the home's `serving`), and the bundle that serves."""

    def __init__(self, folder: Path, pipeline: str) -> None:
        self.pipeline = pipeline
        self.link = folder / pipeline
        self.states = folder / f".{pipeline}"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / f".{pipeline}.lock")

    # -- reading --------------------------------------------------------------------------------------------------
    @property
    def state(self) -> Path | None:
        """The folder of the current state, links followed: what is read from it belongs together."""
        return self.link.resolve() if self.link.is_symlink() else None

    @property
    def bundle(self) -> Path | None:
        """The bundle that serves now, links followed; None if nothing serves."""
        path = self.link / BUNDLE
        return path.resolve() if path.exists() else None

    def entries(self) -> list[Entry]:
        """All lines, oldest first. Raises: RankdError naming a damaged line, and where an older copy lies."""
        state = self.state
        return _read(state / LEDGER) if state is not None else []

    def champion(self) -> Entry | None:
        """Who serves now."""
        return _serving(self.entries())

    def services(self) -> list[Service]:
        """Who served from when to when, oldest first."""
        serving = [entry for entry in self.entries() if entry.event in SERVES]
        ended = [*(after.time for _, after in pairwise(serving)), None]
        return [Service(entry, entry.time, until) for entry, until in zip(serving, ended, strict=True)]

    def look(self) -> int:
        """Which challenger of the present champion is next: 1, and one more for each that was refused since it serves.

        Trials at smoke scale were never compared with it, so they do not count.
        """
        entries = self.entries()
        since = self.serving_line()
        return 1 + sum(entry.event == "refused" and entry.scale != "smoke" for entry in entries[since:])

    def registered(self, recipe: str) -> Entry | None:
        """The registration of the deployment with this recipe."""
        return _registered(self.entries(), recipe)

    def serving_line(self) -> int:
        """Number (from 1) of the line by which the champion serves; 0 if nothing does. Mirrors of the ledger follow it."""
        return max((number for number, entry in enumerate(self.entries(), 1) if entry.event in SERVES), default=0)

    def pending(self) -> dict[str, str]:
        """Mirrors that do not show the champion yet, and why."""
        line, known = self.serving_line(), self._mirrors()
        found = {}
        for name in MIRROR_NAMES if line else ():
            note = known.get(name, {"line": 0, "problem": ""})
            if note != {"line": line, "problem": ""}:
                found[name] = note["problem"] or "waits for the next tick"
        return found

    def _mirrors(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.states / MIRRORS).read_text()))
        except (OSError, ValueError):
            return {}

    # -- writing --------------------------------------------------------------------------------------------------
    def note_mirror(self, name: str, line: int, problem: str) -> None:
        """Remember which line a mirror shows, or why it does not."""
        with self._lock:
            known = self._mirrors()
            if known.get(name) == {"line": line, "problem": problem}:
                return
            self.states.mkdir(exist_ok=True)
            temporary = self.states / f".{MIRRORS}"
            temporary.write_text(json.dumps({**known, name: {"line": line, "problem": problem}}))
            temporary.replace(self.states / MIRRORS)

    def register(self, recipe: str, bundle: str, scale: str, score: float | None, test_data: str, run_id: str | None) -> Entry:
        """Register a bundle once; a second call with the same recipe returns the first entry."""
        with self._lock:
            entries = self.entries()
            known = _registered(entries, recipe)
            if known is not None:
                return known
            version = max((entry.version for entry in entries), default=0) + 1
            entry = Entry("registered", version, recipe, bundle, scale, score, test_data, "deployed", run_id, time.time())
            return self._commit(entry)

    def decide(
        self, registered: Entry, event: Event, reason: str, check: Check | None = None, against: Entry | None = None
    ) -> Entry:
        """Record that a registered version became champion (and let it serve) or was refused, once.

        check is called with the copy of a bundle that is about to serve; what it raises leaves everything as it was. against
        is the champion that the decision compared it with. Raises: RankdError if another one serves by now.
        """
        with self._lock:
            serving = self.champion()
            if against is not None and (serving is None or serving.version != against.version):
                now = f"v{serving.version}" if serving is not None else "nothing"
                raise RankdError(
                    f"{self.pipeline}: v{registered.version} was compared with v{against.version}, but {now} serves by now; "
                    "nothing was changed: run again."
                )
            last = [entry for entry in self.entries() if entry.version == registered.version and entry.event != "registered"]
            if last and last[-1].event == event:
                return last[-1]
            return self._commit(Entry(**{**asdict(registered), "event": event, "reason": reason, "time": time.time()}), check)

    def roll_back(self, to: int | None, why: str, run_id: str | None = None, check: Check | None = None) -> tuple[Entry, Entry]:
        """Let a version serve that served before (default: the one before the champion); returns (new entry, entry it replaces).

        Raises: RankdError if nothing serves, or `to` never served or does so now; whatever `check` raises.
        """
        with self._lock:
            entries = self.entries()
            serving = [entry for entry in entries if entry.event in SERVES]
            if not serving:
                raise RankdError(f"{self.pipeline}: nothing has served yet, so there is nothing to roll back to.")
            now = serving[-1]
            earlier = list(dict.fromkeys(entry.version for entry in reversed(serving) if entry.version != now.version))
            wanted = to if to is not None else (earlier[0] if earlier else None)
            if wanted == now.version:
                raise RankdError(f"{self.pipeline}: version {wanted} serves already.")
            if wanted not in earlier:
                known = ", ".join(f"v{version}" for version in earlier) or "none"
                what = f"version {to} has not served" if to is not None else "no other version has served"
                raise RankdError(f"{self.pipeline}: {what}; a rollback can go to a version that served before: {known}.")
            back = next(entry for entry in reversed(serving) if entry.version == wanted)
            reason = f"rolled back from v{now.version}" + (f": {why}" if why else "")
            changes = {"event": "rollback", "reason": reason, "time": time.time(), "run_id": run_id}
            return self._commit(Entry(**{**asdict(back), **changes}), check), now

    def _commit(self, entry: Entry, check: Check | None = None) -> Entry:
        """Write the next state whole, then switch to it."""
        state = self.state
        number = int(state.name) + 1 if state is not None else 1
        before = (state / LEDGER).read_bytes() if state is not None else b""
        bundle = os.readlink(state / BUNDLE) if state is not None and (state / BUNDLE).is_symlink() else None
        if entry.event in SERVES:
            copy = self._own_copy(entry)
            if check is not None:
                check(copy)
            bundle = os.path.relpath(copy, self.states / "state")
        following = self.states / f"{number:06d}"
        shutil.rmtree(following, ignore_errors=True)  # what a kill left
        following.mkdir(parents=True)
        _write_synced(following / LEDGER, before + (json.dumps(asdict(entry), sort_keys=True) + "\n").encode())
        if bundle is not None:
            (following / BUNDLE).symlink_to(bundle)
        sync_path(following)
        temporary = self.link.with_name(f".{self.pipeline}.next")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f".{self.pipeline}/{following.name}")
        temporary.replace(self.link)
        sync_path(self.link.parent)
        for old in self._old_states(number):
            shutil.rmtree(old, ignore_errors=True)
        return entry

    def _own_copy(self, entry: Entry) -> Path:
        """The serving copy of a bundle, made once: the store may be far away, or cleaned up, when it is needed."""
        target = self.states / BUNDLES / f"v{entry.version:04d}-{entry.recipe}"
        if target.is_dir():
            return target
        source = Path(entry.bundle)
        if not source.is_dir():
            raise RankdError(f"{self.pipeline}: the bundle of version {entry.version} is gone ({source}); deploy it again.")
        temporary = target.with_name(f".{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync_path(path)
        temporary.rename(target)
        sync_path(target.parent)
        return target

    def _old_states(self, number: int) -> Iterator[Path]:
        return (path for path in self.states.glob("[0-9]*") if int(path.name) <= number - KEEP_STATES)


def open_ledger(current: Settings, pipeline: str) -> Ledger:
    """The ledger of a pipeline under these settings."""
    return Ledger(current.serving_dir, pipeline)


def ledgers(folder: Path) -> list[Ledger]:
    """Every pipeline's ledger under `folder`."""
    return [Ledger(folder, path.name) for path in sorted(folder.glob("[!.]*")) if path.is_symlink()] if folder.is_dir() else []


def _registered(entries: list[Entry], recipe: str) -> Entry | None:
    return next((entry for entry in entries if entry.event == "registered" and entry.recipe == recipe), None)


def _serving(entries: list[Entry]) -> Entry | None:
    return next((entry for entry in reversed(entries) if entry.event in SERVES), None)


def _read(path: Path) -> list[Entry]:
    entries = []
    text = path.read_text(errors="replace") if path.exists() else "missing"
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError):
            raise RankdError(
                f"{path}, line {number}: not a ledger entry; {path.parent.parent} holds older copies: put one in its place."
            ) from None
    return entries


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
