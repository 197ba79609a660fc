"""Stream guards in process: the released Qwen3Guard-Stream checkpoints, and fine-tuned ones of the same shape.

What is judged where, and how the tokens of a text become a verdict, is in `tidegate.guards.qwen_stream`. Here one
engine computes all prompts and all streams.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidegate.engine.engine import Engine, Handle, Metrics
from tidegate.engine.onnx_runner import OnnxStream
from tidegate.engine.scheduler import Limits
from tidegate.errors import GuardUnavailable, InputError
from tidegate.guards.edge_config import Reading as HeadReading
from tidegate.guards.qwen_stream import Qwen3StreamSession, QwenStreamGuard, confirmed, head_readings
from tidegate.model.folders import checkpoint_folder, read_config
from tidegate.model.onnx_backbone import OnnxBackbone, is_export
from tidegate.model.qwen_template import QwenTemplate
from tidegate.model.qwen_tokens import QwenTokenizer
from tidegate.types import Target

if TYPE_CHECKING:
    from tidegate.model.stream import Qwen3ForGuardModel

__all__ = ["Qwen3StreamGuard", "Qwen3StreamSession", "confirmed"]

_MOST_WHOLE: Final = 1_024
"""How many whole texts may be judged at once, beside the sessions."""


class Qwen3StreamGuard(QwenStreamGuard):
    """Judges prompts and answers, whole and as they are written, with a Stream checkpoint.

    Usable from several event loops at once.

    Args:
        source: a folder in the released layout, or one of ``tidegate export``, or the name of a repository on the hub,
            which is then fetched.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` for that of the checkpoint.
        device: where to compute, as ``cpu`` or ``cuda:1``.
        revision: commit, branch or tag on the hub; None for its main branch. Not for folders.
        custom: names of categories that the checkpoint may have beside the official ones.
        threads: how many threads torch may use for one forward; None for its own choice.
        positions: size of the cache in tokens, shared by all streams. 0.6B takes 112 KiB for each in bfloat16.
        debounce: how many tokens in a row confirm a severity of a whole answer; at least 1.
        most_sessions: how many sessions may be open at once.

    Raises:
        InputError: when one of these arguments cannot be.
        GuardUnavailable: when the checkpoint is incomplete, or one of its files cannot be used; says which.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        revision: str | None = None,
        custom: Collection[str] = (),
        threads: int | None = None,
        positions: int = 32_768,
        debounce: int = 2,
        most_sessions: int = 1024,
    ) -> None:
        super().__init__(debounce=debounce, most_sessions=most_sessions)
        folder = checkpoint_folder(source, revision=revision)
        self._name = f"stream/{Path(source).name}"
        self._readings = _read_labels(folder, custom)
        self._template = _read_template(folder)
        model: Qwen3ForGuardModel | OnnxStream
        if is_export(folder):
            model = _load_export(folder, dtype, device, threads)
        else:
            model = _load(folder, dtype, device, custom, threads)
        self._window = min(int(model.config.max_position_embeddings), positions)
        _check_vocabulary(folder, self._template.tokenizer, int(model.config.vocab_size))
        self._engine = Engine(
            model,
            positions=positions,
            window=self._window,
            limits=Limits(waiting=max(Limits().waiting, 2 * self._window)),
            most_streams=most_sessions + _MOST_WHOLE,
        )

    @property
    def name(self) -> str:
        """``stream/`` and the name of the folder or repository."""
        return self._name

    async def health(self, timeout_seconds: float = 30.0) -> float:
        """Judge a known text, in turn with all others, and compare with what the model says of it alone.

        Returns:
            The seconds it took.

        Raises:
            GuardTimeout: when no answer came in time.
            GuardUnavailable: when the answer is wrong, or the guard is closed.
            GuardError: when there is none.
        """
        self._check_open()
        return await self._engine.health(timeout_seconds)

    def metrics(self) -> Metrics:
        """What its engine did so far and does now."""
        return self._engine.metrics()

    async def close(self) -> None:
        """Stop the thread and free cache and model; sessions that are open fail from now on. Safe to call twice."""
        await self._engine.aclose()

    def _check_open(self) -> None:
        if self._engine.closed:
            raise GuardUnavailable("the guard is closed")

    def _stream(self, before: Sequence[int]) -> Handle:
        return self._engine.open(before)

    async def _ready(self) -> None:
        """A guard in process is ready from the beginning."""


def _read_labels(folder: Path, custom: Collection[str]) -> dict[Target, HeadReading]:
    try:
        return head_readings(read_config(folder), custom)
    except InputError as error:
        raise GuardUnavailable(f"the config of {folder} cannot be used: {error}") from error


def _read_template(folder: Path) -> QwenTemplate:
    try:
        return QwenTemplate(QwenTokenizer.load(folder / "tokenizer.json"))
    except GuardUnavailable as error:
        raise GuardUnavailable(f"the tokenizer of {folder} cannot be used: {error}") from error


def _load_export(folder: Path, dtype: str, device: str, threads: int | None) -> OnnxStream:
    if dtype not in ("auto", "float32"):
        raise InputError("an export computes in float32", where="dtype")
    if device != "cpu":
        raise InputError("an export runs on the CPU", where="device")
    return OnnxStream(OnnxBackbone(folder, threads=threads))


def _load(folder: Path, dtype: str, device: str, custom: Collection[str], threads: int | None) -> Qwen3ForGuardModel:
    from tidegate.model.loading import load_stream  # torch, which exports do without
    from tidegate.model.threads import computed_apart, use_threads

    if threads is not None:
        use_threads(threads)
    try:
        return computed_apart(lambda: load_stream(folder, dtype=dtype, device=device, custom=custom))
    except InputError as error:
        if error.where == "dtype":
            raise
        raise GuardUnavailable(f"the config of {folder} cannot be used: {error}") from error
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there or is full
        raise GuardUnavailable(f"{folder} cannot be loaded on {device}: {type(error).__name__}") from error


def _check_vocabulary(folder: Path, tokenizer: QwenTokenizer, size: int) -> None:
    if beyond := [name for name, token_id in tokenizer.control.items() if token_id >= size]:
        raise GuardUnavailable(
            f"{folder}: the tokenizer is not of this model, which knows no {', '.join(beyond[:3])}: "
            f"its vocabulary has {size} tokens"
        )
