"""Weights on disk: safetensors with text metadata; never pickle."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankd_pipeline.errors import ArtifactDamaged, RankdError


def save_weights(module: nn.Module, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write all parameters and buffers of `module` to `path`, with `metadata` in the header; atomic.

    The same weights and metadata give the same bytes (safetensors orders tensors by dtype and name).
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_tensors(tensors, Path(path), dict(metadata or {}))


def load_weights(module: nn.Module, path: Path | str) -> dict[str, str]:
    """Load `path` into `module`, strictly, and return the file's metadata.

    Raises:
        RankdError: the file is missing, or holds other tensors or shapes than `module` has.
        ArtifactDamaged: the file is truncated or is no safetensors file.
    """
    tensors, metadata = read_tensors(Path(path))
    wrong = _difference(module, tensors)
    if wrong:
        raise RankdError(f"{path}: {wrong}; the network's settings must be those the weights were trained with")
    module.load_state_dict(tensors)
    return metadata


def load_if_they_fit(module: nn.Module, path: Path | str) -> str:
    """Load `path` into `module` if tensors and shapes are the same; else leave it as it is and say what differs.

    Raises as `load_weights` does for a file that is missing or damaged.
    """
    tensors, _ = read_tensors(Path(path))
    wrong = _difference(module, tensors)
    if not wrong:
        module.load_state_dict(tensors)
    return wrong


def _difference(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not wrong:
        return ""
    return (
        f"the weights do not fit the network {type(module).__name__}: {len(wrong)} tensors differ, "
        f"first {wrong[0]!r}: found {found.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}"
    )


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write `tensors` to `path` whole or not at all: a temporary neighbour, flushed to disk, then one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata=metadata)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise RankdError(f"{path}: the weights could not be written ({error}); free some space and run again") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file and its metadata; errors as in `load_weights`."""
    if not path.is_file():
        raise RankdError(f"{path}: there is no such weights file; run the step that trains it")
    try:
        with safe_open(path, framework="pt") as handle:
            names = handle.keys()
            return {name: handle.get_tensor(name) for name in names}, dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactDamaged(
            f"{path}: not a whole safetensors file ({error}); delete it and run the step that trains it again"
        ) from error
