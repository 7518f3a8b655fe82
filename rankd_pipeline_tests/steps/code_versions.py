"""Which source a code version stands for: a hash of every module that a step, or a function's facet, reaches.

Run `python -m rankd_pipeline_tests.steps.code_versions` after bumping a version, to record the new hashes. It refuses to
record a changed hash under an old version.
"""

import ast
import hashlib
import json
import sys
from functools import cache
from pathlib import Path

import rankd_pipeline
from rankd_pipeline.ran_functions.registry import function_names, load_function
from rankd_pipeline.steps.chain import INFO

PACKAGE = Path(rankd_pipeline.__file__).parent
RECORD = Path(__file__).with_name("code_versions.json")
# What brings a step its inputs and takes its outputs, but does not shape them.
PLUMBING = (
    "errors",
    "settings",
    "progress",
    "spec",
    "steps.runner",
    "steps.chain",
    "ran_functions.contract",
    "ran_functions.registry",
)
# Facet modules of a function have versions of their own.
FACETS = {"simulate": "simulate", "labels": "function", "networks": "networks", "baselines": "baselines", "metrics": "metrics"}


def module_path(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


@cache
def imports_of(name: str) -> frozenset[str]:
    """Modules of the package that module `name` imports anywhere, inside functions too."""
    path = module_path(name)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())) if path else ():
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rankd_pipeline"):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names if module_path(f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("rankd_pipeline"))
    return frozenset(item for item in found if module_path(item))


def closure(start: str, stop: tuple[str, ...]) -> list[str]:
    """`start` and every module it reaches, except those in `stop` and what only they reach."""
    reached, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in reached and not any(name == f"rankd_pipeline.{item}" for item in stop):
            reached.add(name)
            waiting.extend(imports_of(name))
    return sorted(reached)


def meaning(name: str) -> str:
    """The code of a module without comments, layout and docstrings: a better explanation is no new version."""
    path = module_path(name)
    tree = ast.parse(path.read_text() if path else "")
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree)


def hash_of(start: str, stop: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in closure(start, stop):
        digest.update(f"{name}\n{meaning(name)}\n".encode())
    return digest.hexdigest()[:16]


def current() -> dict[str, dict[str, str]]:
    """{what: {version, hash}} of every step and every facet, as the tree is now."""
    found = {}
    for info in INFO.values():
        others = tuple(f"steps.{other.name}" for other in INFO.values() if other.name != info.name)
        found[f"step {info.name}"] = {
            "version": info.code_version,
            "hash": hash_of(f"rankd_pipeline.steps.{info.name}", (*PLUMBING, *others)),
        }
    for name in function_names():
        versions = load_function(name).code_versions
        for facet, module in FACETS.items():
            start = f"rankd_pipeline.ran_functions.{name}.{module}"
            if module_path(start):
                others = tuple(f"ran_functions.{name}.{other}" for other in FACETS.values() if other != module)
                found[f"{name} {facet}"] = {"version": versions.get(facet, "0"), "hash": hash_of(start, (*PLUMBING, *others))}
    return found


def unbumped(record: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """What changed its source but not its version."""
    return [
        name
        for name, entry in now.items()
        if name in record and record[name]["version"] == entry["version"] != "" and record[name]["hash"] != entry["hash"]
    ]


def main() -> int:
    now = current()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    stale = unbumped(record, now)
    if stale and "--first-release" not in sys.argv:
        print("changed without a new version: " + ", ".join(stale), file=sys.stderr)
        return 1
    RECORD.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
