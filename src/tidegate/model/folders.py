"""Where a checkpoint lies, and its config: found, fetched and read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tidegate.errors import GuardUnavailable, InputError

__all__ = ["INDEX", "WEIGHTS", "checkpoint_folder", "read_config", "read_json"]

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_FILES: Final = ("config.json", "*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json")
"""What is fetched of a repository: nothing that could be run."""


def checkpoint_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``source`` itself when it is one, else the local copy of a repository on the hub.

    Raises:
        InputError: when a revision is asked of a folder.
        GuardUnavailable: when there is no such folder, and the hub does not have it or cannot be reached.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise InputError("a folder has no revisions", where="revision")
        return Path(source)
    if isinstance(source, Path):
        raise GuardUnavailable(f"{source} is not a folder")
    from huggingface_hub import snapshot_download  # of the extra torch: a folder needs no hub

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises what its HTTP client raises, which differs by version
        raise GuardUnavailable(
            f"{source} is neither a folder nor a repository that could be fetched: {type(error).__name__}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint, as it stands.

    Raises:
        GuardUnavailable: when it is missing or not JSON.
        InputError: when it is not the config of a Stream checkpoint.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "qwen3" or "Qwen3ForGuardModel" not in (config.get("architectures") or []):
        raise InputError(
            "expected model_type qwen3 and the architecture Qwen3ForGuardModel", where=f"{folder / 'config.json'}"
        )
    if config.get("quantization_config"):
        raise InputError("quantized checkpoints are not read", where="config.quantization_config")
    if config.get("use_sliding_window"):
        raise InputError("sliding windows are not supported", where="config.use_sliding_window")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises GuardUnavailable when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GuardUnavailable(f"{path} cannot be read") from error
    except ValueError as error:
        raise GuardUnavailable(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise GuardUnavailable(f"{path} does not hold a JSON object")
    return value
