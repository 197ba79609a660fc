"""Guards by name: ``load_guard("edge")`` is the one in the wheel, ``edge:FOLDER`` one of your own training.

``stream:FOLDER`` is a Stream checkpoint, the official ones included, also by its name on the hub
(``stream:OWNER/NAME``): prompts, answers, and answers while they are written. ``gen:FOLDER`` is a Gen checkpoint, by
folder or by name in the same way.
``cascade:FIRST,SECOND`` asks a second guard where the first is not sure; ``cascade:FILE`` says when, as data.
``remote:URL#MODEL`` is a Gen guard behind an OpenAI-compatible server, ``vllm-stream:URL`` a Stream guard behind vLLM.
``tidegate:URL`` is another Tidegate, whatever guard it has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, overload

from tidegate.errors import GuardError, GuardUnavailable, InputError
from tidegate.guards.base import AdaptableGuard, Guard, Session, StreamGuard

__all__ = ["AdaptableGuard", "Guard", "GuardRow", "Session", "StreamGuard", "list_guards", "load_guard"]

_SPECS: Final = (
    "expected edge, or edge:FOLDER with a folder that tidegate export wrote, or stream:FOLDER, or gen:FOLDER, "
    "or cascade:FIRST,SECOND, or remote:URL#MODEL, or vllm-stream:URL, or tidegate:URL"
)
_CHECKPOINTS: Final = ("stream", "gen")


@dataclass(frozen=True, slots=True)
class GuardRow:
    """One line of ``tidegate guards``.

    Attributes:
        spec: what `load_guard` takes.
        description: what it is, in a sentence.
        languages: BCP-47 tags that it was trained on.
        bytes: size on disk; 0 when it is not there.
        available: whether it can be loaded.
        why_not: what is missing; "" when it is available.
    """

    spec: str
    description: str
    languages: tuple[str, ...]
    bytes: int
    available: bool
    why_not: str = ""


@overload
def load_guard(spec: str = "edge", *, threads: int | None = None) -> StreamGuard: ...
@overload
def load_guard(spec: str, *, threads: int | None = None, adapters: Mapping[str, str | Path]) -> AdaptableGuard: ...
def load_guard(
    spec: str = "edge", *, threads: int | None = None, adapters: Mapping[str, str | Path] | None = None
) -> StreamGuard:
    """Load a guard into memory.

    Args:
        spec: ``edge`` for the shipped one, ``edge:FOLDER`` for another folder with model, tokenizer and config;
            ``stream:FOLDER`` or ``stream:OWNER/NAME`` for a Stream checkpoint, and ``gen:FOLDER`` or ``gen:OWNER/NAME``
            for a Gen checkpoint, which both need the extra ``torch``, but for folders of ``tidegate export``;
            ``cascade:FIRST,SECOND`` with the specs of two guards, or ``cascade:FILE`` with a YAML or JSON file;
            ``remote:URL[,URL...]#MODEL`` for a Gen guard behind a server or several, or ``remote:FILE``;
            ``vllm-stream:URL[,URL...][#MODEL]`` for a Stream guard behind vLLM servers, or ``vllm-stream:FILE``;
            ``tidegate:URL`` for another Tidegate, as ``tidegate:ws://host:8080``, or ``tidegate:FILE``.
        threads: how many threads one run of the model may use; None for one, and on torch for its own choice.
        adapters: folders with LoRA adapters for a ``gen:`` guard, as peft writes them, by name. The guard itself uses
            none; its method ``adapted`` chooses one, for as little as one request.

    Raises:
        InputError: when there is no guard of that name (lists those that exist), or it takes no adapters.
        GuardUnavailable: when its files are missing or cannot be used; says which and where.
    """
    kind, _, rest = spec.partition(":")
    nameless = not rest and (kind in _CHECKPOINTS or ":" in spec)
    if kind not in ("edge", "cascade", "remote", "vllm-stream", "tidegate", *_CHECKPOINTS) or nameless:
        raise InputError(f"unknown guard {spec!r}: {_SPECS}", where="guard")
    if adapters is not None and kind != "gen":
        raise InputError(f"only gen: guards take adapters, not {kind}", where="adapters")
    if kind == "cascade":
        from tidegate.guards.cascade import load_cascade

        return load_cascade(rest, lambda part: load_guard(part, threads=threads))
    if kind == "remote":
        from tidegate.guards.remote import load_remote

        return load_remote(rest)
    if kind == "vllm-stream":
        from tidegate.guards.vllm_stream import load_vllm_stream

        return load_vllm_stream(rest)
    if kind == "tidegate":
        from tidegate.guards.tidegate_live import load_tidegate

        return load_tidegate(rest)
    if kind in _CHECKPOINTS:
        return _load_checkpoint(kind, rest, threads, adapters or {})
    from tidegate.guards.edge import EdgeGuard

    return EdgeGuard(Path(rest) if rest else None, threads=threads or 1)


def _load_checkpoint(kind: str, name: str, threads: int | None, adapters: Mapping[str, str | Path]) -> StreamGuard:
    try:
        if kind == "stream":
            from tidegate.guards.stream import Qwen3StreamGuard

            return Qwen3StreamGuard(name, threads=threads)
        from tidegate.guards.gen import GenGuard

        return GenGuard(name, threads=threads, adapters=adapters)
    except ModuleNotFoundError as error:
        raise GuardUnavailable(f"{kind}: guards need {error.name}: pip install 'tidegate[torch]'") from error


_KINDS: Final = (
    ("stream:FOLDER_OR_NAME", "a Stream checkpoint in this process, official or fine-tuned, or an export of one", True),
    ("gen:FOLDER_OR_NAME", "a Gen checkpoint in this process, official or fine-tuned, or an export of one", True),
    ("vllm-stream:URL[,URL]", "a Stream checkpoint in vLLM with Tidegate's plugin", False),
    ("remote:URL[,URL]#MODEL", "a Gen checkpoint behind OpenAI-compatible servers", False),
    ("tidegate:URL", "another Tidegate", False),
    ("cascade:FIRST,SECOND", "the first, and the second where the first is not sure or raises an alarm", False),
)
"""Guards that are somewhere else: spec, what it is, and whether it needs the extra ``torch``."""


def list_guards() -> list[GuardRow]:
    """The guards of this installation, whether or not they can be loaded. Loads no model, and asks no server.

    Returns:
        First the guard in the package, then each kind that a spec can name.
    """
    torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    why_not = "there is no torch here: pip install 'tidegate[torch]'. Folders of tidegate export need none"
    kinds = [
        GuardRow(spec, description, (), 0, torch or not needs_torch, "" if torch or not needs_torch else why_not)
        for spec, description, needs_torch in _KINDS
    ]
    return [_shipped(), *kinds]


def _shipped() -> GuardRow:
    from tidegate.guards.edge import EDGE_FILES, SHIPPED, WIDE_FILE
    from tidegate.guards.edge_config import read_config

    description = "the small guard in the package: prompts, answers and streams, on CPU, no download"
    files = [SHIPPED / name for name in (*EDGE_FILES, WIDE_FILE)]
    size = sum(path.stat().st_size for path in files if path.is_file())
    missing = [name for name in EDGE_FILES if not (SHIPPED / name).is_file()]
    if missing:
        return GuardRow("edge", description, (), size, False, f"{SHIPPED} lacks {', '.join(missing)}")
    try:
        config, _ = read_config(SHIPPED / "config.json")
    except GuardError as error:
        return GuardRow("edge", description, (), size, False, str(error))
    return GuardRow("edge", description, config.languages, size, True)
