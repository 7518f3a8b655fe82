"""The artifact store: content-addressed, atomically published step outputs, and the manifests that are the lineage.

An artifact lies at `<store>/<pipeline>/<step>/<recipe>/` with `manifest.json`, `observed.json` and its files. It is
whole or absent: a step writes into a work folder that survives a kill and is published by one rename.
The manifest says nothing of time or chance, so an artifact made again has the same manifest, byte for byte, and the
hashes by which later manifests name it still hold; files that are measurements are listed in `observed.json`.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout

from rankd_pipeline.errors import ArtifactDamaged, Busy, RankdError

MANIFEST, OBSERVED = "manifest.json", "observed.json"
RECIPE_LENGTH = 24


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a step's output; its digest is the artifact's address.

    inputs maps an input's step name to the content version it had; libraries maps a distribution to its version;
    host is set only where the result is a measurement of this machine.
    """

    pipeline: str
    step: str
    code_version: str
    config: Mapping[str, Any]
    scale: str
    seed: int
    variant: str
    inputs: Mapping[str, str]
    libraries: Mapping[str, str]
    host: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline, "step": self.step, "code_version": self.code_version,
            "config": dict(self.config), "scale": self.scale, "seed": self.seed, "variant": self.variant,
            "inputs": dict(self.inputs), "libraries": dict(self.libraries), "host": self.host,
        }  # fmt: skip

    @property
    def digest(self) -> str:
        return sha256_text(canonical_json(self.as_json()))[:RECIPE_LENGTH]


@dataclass(frozen=True)
class Artifact:
    """A published step output: a local folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]
    cached: bool = field(default=True, compare=False)

    @property
    def pipeline(self) -> str:
        return self.manifest["recipe"]["pipeline"]

    @property
    def step(self) -> str:
        return self.manifest["recipe"]["step"]

    @property
    def recipe(self) -> str:
        return self.manifest["recipe_digest"]

    @property
    def version(self) -> str:
        """Content digest: equal content, equal version, whatever made it and when."""
        return self.manifest["version"]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def skipped(self) -> str | None:
        """Why the step did not apply, or None."""
        return self.manifest["skipped"]

    @property
    def observed(self) -> dict[str, Any]:
        """Times, run ids and measurements: true of this making, no part of the version.

        Raises: ArtifactDamaged if the file is missing or no JSON object.
        """
        path = self.path / OBSERVED
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise ArtifactDamaged(f"{path}: missing or not a JSON object; delete the folder and run again.")
        return value

    @property
    def manifest_sha256(self) -> str:
        return sha256_file(self.path / MANIFEST)

    def file(self, name: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise ArtifactDamaged(f"{path}: missing from artifact {self.step} {self.recipe}; delete the folder and run again.")
        return path

    def verify(self) -> None:
        """Check every file against the manifest, and that no file was added: a stray shard would be read with the others.

        Raises: ArtifactDamaged naming the first file whose hash differs or that the manifest does not list.
        """
        listed = {**self.manifest["files"], **self.observed.get("files", {})}
        for name, entry in listed.items():
            path = self.path / name
            found = sha256_file(path) if path.is_file() else "nothing"
            if found != entry["sha256"]:
                raise ArtifactDamaged(
                    f"{path}: its manifest expects sha256 {entry['sha256'][:12]}…, found {found[:12]}; the file was truncated or "
                    f"edited. Delete the folder {self.path} and run again: it is remade from its inputs."
                )
        added = _relative_files(self.path) - set(listed)
        if added:
            raise ArtifactDamaged(f"{self.path / min(added)}: its manifest does not list it; move the file away and run again.")


@dataclass
class Draft:
    """An artifact being made. `out` is what gets published, `scratch` holds checkpoints and is thrown away then.

    volatile names files that are measurements (not part of the version).
    """

    recipe: Recipe
    out: Path
    scratch: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    volatile: set[str] = field(default_factory=set)
    skipped: str | None = None


@dataclass
class RunUse:
    """What one run reached: the recipe of each step it made or took from the store. last_used: seconds since 1970."""

    run_id: str
    scale: str
    recipes: dict[str, str]
    last_used: float


class Store:
    """Artifacts under one fsspec URI.

    A plain folder is used in place. Any other URI is mirrored: drafts and fetched artifacts lie under `cache`, a
    publish uploads the files first and the manifest last, so that there too an artifact is whole or absent.
    """

    def __init__(self, uri: str | Path, cache: Path | None = None) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(str(uri))
        self.uri = str(uri)
        self.is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))
        if not self.is_local and cache is None:
            raise RankdError(f"store {uri}: a remote store needs a local cache folder.")
        self.local = Path(self._root) if self.is_local else Path(cache or "")
        self.work = self.local / ".work"
        self.locks = self.local / ".locks"

    # -- reading ------------------------------------------------------------------------------------------------
    def folder(self, pipeline: str, step: str, recipe: str) -> Path:
        return self.local / pipeline / step / recipe

    def get(self, pipeline: str, step: str, recipe: str) -> Artifact | None:
        """The complete artifact of `recipe`, or None; a remote one is brought into the cache first.

        Raises: ArtifactDamaged if its manifest is unreadable or was edited. Files are checked by `Artifact.verify`.
        """
        folder = self.folder(pipeline, step, recipe)
        if not (folder / MANIFEST).is_file() and not (not self.is_local and self._download(folder)):
            return None
        return _read_artifact(folder)

    def artifacts(self, pipeline: str | None = None, step: str | None = None) -> Iterator[Artifact]:
        """All complete artifacts, in path order; one whose manifest is damaged is left out (`get` tells of it).

        Of a remote store only the manifests are brought here: use `get` for the files.
        """
        pattern = f"{self._root}/{pipeline or '*'}/{step or '*'}/*/{MANIFEST}"
        for found in sorted(str(path) for path in self._fs.glob(pattern)):
            *_, owner, name, recipe, _ = found.split("/")
            folder = self.folder(owner, name, recipe)
            if not (folder / MANIFEST).is_file():
                folder = self._bring_manifest(folder)
            try:
                yield _read_artifact(folder)
            except ArtifactDamaged:
                continue

    # -- writing ------------------------------------------------------------------------------------------------
    @contextmanager
    def lock(self, name: str, wait: Callable[[str], None] | None = None, timeout: float = 12 * 3600) -> Iterator[None]:
        """One holder per name, released by the kernel when its process dies.

        wait is called once with a sentence if another process holds it; timeout 0 means do not wait (raises Busy).
        """
        path = self.locks / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if timeout <= 0:
                raise Busy(f"{name} is being made by another rankd process; wait for it or stop it.") from None
            if wait is not None:
                wait(f"{name} is being made by another rankd process: waiting for it")
            try:
                lock.acquire(timeout=timeout, poll_interval=0.2)
            except Timeout:
                raise Busy(f"{name} was still held by another rankd process after {timeout:.0f} s.") from None
        try:
            yield
        finally:
            lock.release()

    def draft(self, recipe: Recipe) -> Draft:
        """The work folder of a recipe: the same after a kill, so that a step can go on from its checkpoint."""
        folder = self.work / recipe.pipeline / recipe.step / recipe.digest
        for part in ("out", "scratch"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return Draft(recipe, folder / "out", folder / "scratch")

    def publish(self, draft: Draft, inputs: Mapping[str, Artifact]) -> Artifact:
        """Hash, write the manifest, and move the draft to its address by one rename.

        Files called `*.tmp` are what a killed attempt left half written: they are dropped.
        """
        recipe = draft.recipe
        for path in draft.out.rglob("*.tmp"):
            path.unlink()
        files: dict[str, dict[str, Any]] = {}
        measured: dict[str, dict[str, Any]] = {}
        for name in sorted(_relative_files(draft.out)):
            path = draft.out / name
            sync_path(path)  # before the rename, or a power failure could leave a whole-looking artifact with empty files
            (measured if name in draft.volatile else files)[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        content = {name: entry["sha256"] for name, entry in files.items()}
        try:
            metrics = json.loads(canonical_json(draft.metrics))
        except ValueError as error:
            raise RankdError(f"{recipe.step}: a metric cannot be written as JSON ({error}); nothing was published.") from None
        manifest = {
            "recipe": recipe.as_json(),
            "recipe_digest": recipe.digest,
            "version": sha256_text(canonical_json([content, metrics, draft.skipped]))[:RECIPE_LENGTH],
            "inputs": {
                name: {
                    "step": item.step,
                    "recipe": item.recipe,
                    "version": item.version,
                    "manifest_sha256": item.manifest_sha256,
                }
                for name, item in inputs.items()
            },
            "files": files,
            "metrics": metrics,
            "skipped": draft.skipped,
        }
        manifest["seal"] = sha256_text(canonical_json(manifest))
        _write_json(draft.out / OBSERVED, {**draft.observed, "files": measured})
        _write_json(draft.out / MANIFEST, manifest)
        target = self.folder(recipe.pipeline, recipe.step, recipe.digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_local:
            self._upload(draft.out, target)
        if target.exists():  # without a manifest: a removal that was killed half way, or a manifest deleted by hand
            shutil.rmtree(target)
        os.rename(draft.out, target)
        sync_path(target.parent)
        shutil.rmtree(draft.scratch.parent, ignore_errors=True)
        return Artifact(target, manifest, cached=False)

    def note_use(self, artifact: Artifact, run_id: str) -> None:
        """Remember that a run made or reused this artifact; what the last runs reached is what `rankd gc` keeps."""
        entry = {"scale": artifact.manifest["recipe"]["scale"], "recipe": artifact.recipe, "time": time.time()}
        folder = f"{self._root.rstrip('/')}/.runs/{artifact.pipeline}/{run_id}"
        self._fs.makedirs(folder, exist_ok=True)
        self._fs.pipe_file(f"{folder}/{artifact.step}.json", json.dumps(entry).encode())

    def runs(self, pipeline: str) -> list["RunUse"]:
        """What each run reached, the latest first; a note cut short by a power failure is left out."""
        found: dict[str, RunUse] = {}
        for path in self._fs.glob(f"{self._root.rstrip('/')}/.runs/{pipeline}/*/*.json"):
            run_id, step = str(path).removesuffix(".json").split("/")[-2:]
            try:
                entry = json.loads(self._fs.cat_file(path))
                use = found.setdefault(run_id, RunUse(run_id, entry["scale"], {}, 0.0))
                use.recipes[step], use.last_used = entry["recipe"], max(use.last_used, entry["time"])
            except (ValueError, KeyError, TypeError):
                continue
        return sorted(found.values(), key=lambda use: (-use.last_used, use.run_id))

    def forget_run(self, pipeline: str, run_id: str) -> None:
        """Drop the note of what a run reached."""
        self._fs.rm(f"{self._root.rstrip('/')}/.runs/{pipeline}/{run_id}", recursive=True)

    def remove(self, artifact: Artifact) -> None:
        """Delete one artifact; the manifest goes first, so that a stop half way leaves nothing that looks whole."""
        folder = self.folder(artifact.pipeline, artifact.step, artifact.recipe)
        if not self.is_local:
            self._fs.rm(f"{self._remote(folder)}/{MANIFEST}")
            self._fs.rm(self._remote(folder), recursive=True)
            shutil.rmtree(self._index(folder), ignore_errors=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=not self.is_local)

    # -- remote stores ------------------------------------------------------------------------------------------
    def _remote(self, local: Path) -> str:
        return f"{self._root.rstrip('/')}/{local.relative_to(self.local).as_posix()}"

    def _index(self, folder: Path) -> Path:
        return self.local / ".index" / folder.relative_to(self.local)

    def _bring_manifest(self, folder: Path) -> Path:
        index = self._index(folder)
        index.mkdir(parents=True, exist_ok=True)
        for name in (OBSERVED, MANIFEST):
            self._fs.get_file(f"{self._remote(folder)}/{name}", str(index / name))
        return index

    def _upload(self, out: Path, target: Path) -> None:
        remote = self._remote(target)
        paths = sorted((path for path in out.rglob("*") if path.is_file()), key=lambda path: path.name == MANIFEST)
        for path in paths:
            destination = f"{remote}/{path.relative_to(out).as_posix()}"
            self._fs.makedirs(destination.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), destination)

    def _download(self, folder: Path) -> bool:
        remote = self._remote(folder)
        if not self._fs.exists(f"{remote}/{MANIFEST}"):
            return False
        arriving = self.work / "arriving" / f"{folder.name}-{os.getpid()}"
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get(remote, str(arriving), recursive=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(arriving, folder)
        except OSError as error:  # another process brought the same artifact first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(arriving)
        return True


def _read_artifact(folder: Path) -> Artifact:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        seal = sha256_text(canonical_json({key: value for key, value in manifest.items() if key != "seal"}))
        whole = manifest["seal"] == seal and manifest["recipe_digest"] == folder.name
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactDamaged(
            f"{folder / MANIFEST}: not a readable manifest ({type(error).__name__}); delete the folder and run again."
        ) from None
    if not whole:
        raise ArtifactDamaged(f"{folder / MANIFEST}: was edited after it was written; delete the folder and run again.")
    return Artifact(folder, manifest)


def _relative_files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {MANIFEST, OBSERVED}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    sync_path(path)


def sync_path(path: Path) -> None:
    """Have the kernel write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
