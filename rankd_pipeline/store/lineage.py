"""From a bundle back to the corpus: the manifests of every artifact that it was made from, each vouched for by hash.

A bundle carries `lineage.json`: the text of every manifest up the chain, so that the chain reads and proves itself
with no store, no server and no database. Each manifest names its inputs by the sha256 of *their* manifest (a Merkle
tree): whoever changes one word anywhere changes every hash from there down to the bundle.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankd_pipeline.errors import ArtifactDamaged, RankdError
from rankd_pipeline.store.artifact import MANIFEST, Artifact, Store, sha256_text

LINEAGE = "lineage.json"


@dataclass
class Made:
    """One artifact of a lineage. inputs maps step names to recipes; checked says how far its files were proven."""

    step: str
    recipe: str
    version: str
    code_version: str
    scale: str
    seed: int
    variant: str
    config: Mapping[str, Any]
    libraries: Mapping[str, str]
    host: str | None
    inputs: Mapping[str, str]
    manifest_sha256: str
    files: Mapping[str, str]
    run_id: str | None
    finished: float | None
    seconds: float | None
    skipped: str | None
    checked: str = "manifest proven by its hash; files not at hand"


@dataclass(frozen=True)
class SiteRows:
    """Rows of the field that joined a corpus: of which telemetry artifact, which windows [start_s, end_s), how many by site."""

    telemetry: str
    windows: tuple[tuple[float, float], ...]
    sites: Mapping[str, int]


@dataclass
class Lineage:
    """The whole chain, the nearest artifact first. problems is empty when everything that could be checked holds.

    sites: rows by site of everything that any generation of the model learned from. field: the telemetry among it, the
    latest re-distillation first.
    """

    path: str
    pipeline: str
    inputs: Mapping[str, str]
    made: dict[str, Made] = dataclasses.field(default_factory=dict)
    sites: dict[str, int] = dataclasses.field(default_factory=dict)
    field: list[SiteRows] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def intact(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "intact": self.intact, "made": [asdict(item) for item in self.made.values()]}


def write_lineage(inputs: Mapping[str, Artifact], store: Store) -> dict[str, Any]:
    """What a bundle's `lineage.json` holds: {inputs: {step: manifest sha256}, manifests: {sha256: {text, observed}}}.

    The content tells run ids and times, so the file is a volatile one of its artifact.
    Raises: RankdError if the manifest of an ancestor is no longer in the store.
    """
    manifests: dict[str, dict[str, Any]] = {}
    waiting = list(inputs.values())
    while waiting:
        artifact = waiting.pop()
        if artifact.manifest_sha256 in manifests:
            continue
        manifests[artifact.manifest_sha256] = {
            "text": (artifact.path / MANIFEST).read_text(),
            "observed": {key: artifact.observed.get(key) for key in ("run_id", "finished", "seconds", "host")},
        }
        waiting.extend(_inputs_in_store(artifact, store))
    return {
        "inputs": {name: artifact.manifest_sha256 for name, artifact in sorted(inputs.items())},
        "manifests": dict(sorted(manifests.items())),
    }


def _inputs_in_store(artifact: Artifact, store: Store) -> Iterator[Artifact]:
    for name, entry in artifact.manifest["inputs"].items():
        found = store.get(artifact.pipeline, entry["step"], entry["recipe"])
        if found is None or found.manifest_sha256 != entry["manifest_sha256"]:
            what = "is not in the store" if found is None else "has another manifest than when it was read"
            raise RankdError(f"{artifact.step} {artifact.recipe}: its input {name} {entry['recipe']} {what}; run the chain again.")
        yield found


def lineage_of(path: Path, store: Store | None = None) -> Lineage:
    """The lineage of a bundle (a folder with `lineage.json`, or a file in one) or of an artifact in a store.

    With `store`, every file of every artifact that it holds is hashed too; without, the manifests prove each other.
    Raises: RankdError if there is neither a lineage file nor a manifest to start from, or it is no JSON.
    """
    folder = path.parent if path.is_file() else path
    if (folder / LINEAGE).is_file():
        document = _read_document(folder / LINEAGE)
    elif (folder / MANIFEST).is_file() and store is not None:
        head = _artifact_at(folder, store)
        document = write_lineage({head.step: head}, store)
    else:
        raise RankdError(f"{path}: no {LINEAGE} found there; expected a bundle (a folder that `rankd run` reports as bundle).")
    lineage = _walk(str(path), document)
    if store is not None:
        for item in lineage.made.values():
            _check_files(item, lineage, store)
    return lineage


@dataclass(frozen=True)
class Touched:
    """A deployed model that data of a site has touched: how many rows of the general corpus, and of which telemetry."""

    pipeline: str
    recipe: str
    general_rows: int
    field: tuple[SiteRows, ...]


def models_of_site(store: Store, site: str) -> list[Touched]:
    """Every deployment in the store whose training, in any generation, has seen rows of this site; from manifests alone."""
    found = []
    for deployment, lineage in _deployments(store):
        rows = tuple(item for item in lineage.field if site in item.sites)
        general = lineage.sites.get(site, 0) - max((item.sites[site] for item in rows), default=0)
        if site in lineage.sites:
            found.append(Touched(deployment.pipeline, deployment.recipe, general, rows))
    return found


def sites_of_models(store: Store) -> list[str]:
    """Every site whose rows some deployment in the store has seen, in order."""
    return sorted({site for _, lineage in _deployments(store) for site in lineage.sites})


def _deployments(store: Store) -> Iterator[tuple[Artifact, Lineage]]:
    for deployment in store.artifacts(step="deployment"):
        yield deployment, _walk(str(deployment.path), write_lineage({"deployment": deployment}, store))


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        texts = [entry["text"] for entry in document["manifests"].values()]
        if not all(isinstance(text, str) for text in (*texts, *document["inputs"].values())):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RankdError(f"{path}: not a lineage file (expected inputs and manifests); fetch the bundle again.") from None
    return document


def _artifact_at(folder: Path, store: Store) -> Artifact:
    pipeline, step, recipe = folder.resolve().parts[-3:]
    artifact = store.get(pipeline, step, recipe)
    if artifact is None:
        raise RankdError(f"{folder}: no artifact of store {store.uri}; expected a bundle or <store>/<pipeline>/<step>/<recipe>.")
    return artifact


def _walk(path: str, document: dict[str, Any]) -> Lineage:
    """Breadth first from the head, so that nearest comes first; a manifest whose hash is wrong is told and not believed."""
    lineage = Lineage(path, "", document["inputs"])
    waiting = list(document["inputs"].items())
    seen: set[str] = set()
    while waiting:
        name, sha256 = waiting.pop(0)
        if sha256 in seen:
            continue
        seen.add(sha256)
        entry = document["manifests"].get(sha256)
        if entry is None or sha256_text(entry["text"]) != sha256:
            what = "is missing from" if entry is None else "was edited in"
            lineage.problems.append(f"manifest {sha256[:12]}… of {name} {what} {LINEAGE}: the chain is broken there.")
            continue
        try:
            manifest = json.loads(entry["text"])
            lineage.made[sha256] = _made(manifest, sha256, entry.get("observed") or {})
        except (ValueError, KeyError, TypeError, AttributeError):
            lineage.problems.append(f"manifest {sha256[:12]}… of {name} in {LINEAGE} is not one that rankd writes.")
            continue
        lineage.pipeline = lineage.pipeline or manifest["recipe"]["pipeline"]
        if manifest["recipe"]["step"] == "corpus":  # a corpus names the sites whose data it holds
            _touched(lineage, manifest)
        waiting.extend((step, reference["manifest_sha256"]) for step, reference in manifest["inputs"].items())
    return lineage


def _touched(lineage: Lineage, manifest: dict[str, Any]) -> None:
    """Add the sites of a corpus. Generations share the general corpus, so of a site the largest count is the true one."""
    for name, rows in manifest["metrics"].get("sites", {}).items():
        lineage.sites[name] = max(lineage.sites.get(name, 0), rows)
    site = manifest["metrics"].get("site")
    if site is not None:
        windows = tuple((start, end) for start, end in site["windows"])
        lineage.field.append(SiteRows(site["telemetry"], windows, site["sites"]))


def _made(manifest: dict[str, Any], sha256: str, observed: Mapping[str, Any]) -> Made:
    recipe = manifest["recipe"]
    return Made(
        step=recipe["step"], recipe=manifest["recipe_digest"], version=manifest["version"], code_version=recipe["code_version"],
        scale=recipe["scale"], seed=recipe["seed"], variant=recipe["variant"], config=recipe["config"],
        libraries=recipe["libraries"], host=recipe["host"],
        inputs={name: reference["recipe"] for name, reference in manifest["inputs"].items()},
        manifest_sha256=sha256, files={name: entry["sha256"] for name, entry in manifest["files"].items()},
        run_id=observed.get("run_id"), finished=observed.get("finished"), seconds=observed.get("seconds"),
        skipped=manifest["skipped"],
    )  # fmt: skip


def _check_files(item: Made, lineage: Lineage, store: Store) -> None:
    try:
        artifact = store.get(lineage.pipeline, item.step, item.recipe)
        if artifact is None:
            item.checked = "manifest proven by its hash; no longer in the store"
            return
        if artifact.manifest_sha256 != item.manifest_sha256:
            raise ArtifactDamaged(f"{artifact.path}: its manifest is not the one that this chain was made from.")
        artifact.verify()
    except ArtifactDamaged as error:
        item.checked = "damaged"
        lineage.problems.append(str(error))
    else:
        item.checked = f"{len(item.files)} files have their hash"
