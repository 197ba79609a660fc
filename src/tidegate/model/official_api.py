"""The streaming calls of the released Qwen3Guard-Stream models, for programs that were written against them.

``stream_moderate_from_ids`` and ``close_stream`` take and give what the released code does, so that its examples run
when the import is changed::

    from tidegate.model.official_api import Qwen3GuardStream as AutoModel

What differs: a token costs one forward of that token and not of all before it; several tokens may be given at once, as
a tensor, a list or an int; what is wrong is refused before any of it is taken; no code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypedDict

import torch
from torch import Tensor

from tidegate.errors import InputError, SessionClosed
from tidegate.model.cached import CachedText
from tidegate.model.loading import load_stream
from tidegate.model.stream import Qwen3ForGuardModel, StreamLogits

__all__ = ["Moderation", "Qwen3GuardStream", "StreamState"]

_ROLES: Final = ("user", "assistant")


class Moderation(TypedDict):
    """What the model says at every position since the stream began, read with the heads of one role.

    Lists of equal length: the most probable risk level and category by their names in the config, and the probability
    of each, rounded to two digits. A category is named at every position, also where the risk level is Safe.
    """

    risk_level: list[str]
    risk_prob: list[float]
    category: list[str]
    category_prob: list[float]


class StreamState:
    """One open stream; made and used by `Qwen3GuardStream`."""

    def __init__(self, model: Qwen3ForGuardModel) -> None:
        self._model = model
        self._text = CachedText(model)
        self._said = {role: Moderation(risk_level=[], risk_prob=[], category=[], category_prob=[]) for role in _ROLES}
        self._closed = False

    def _append(self, ids: Tensor, names: Mapping[str, tuple[Mapping[int, str], Mapping[int, str]]]) -> None:
        logits = self._text.append(ids)
        for role, (risk, category) in _by_role(logits).items():
            risk_names, category_names = names[role]
            said = self._said[role]
            _extend(said["risk_level"], said["risk_prob"], risk, risk_names)
            _extend(said["category"], said["category_prob"], category, category_names)

    def _close(self) -> None:
        self._closed = True
        self._text.close()


class Qwen3GuardStream:
    """A Stream model with the streaming calls of the released code.

    Args:
        model: as `tidegate.model.loading.load_stream` gives it.
    """

    def __init__(self, model: Qwen3ForGuardModel) -> None:
        self.model = model
        fields = {"user": "query", "assistant": "response"}
        self._names = {
            role: (_names(model, f"{field}_risk_level_map"), _names(model, f"{field}_category_map"))
            for role, field in fields.items()
        }

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device_map: str | torch.device | Mapping[str, str | torch.device] | None = None,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a checkpoint.

        Args:
            source: a folder or the name of a repository on the Hugging Face hub.
            device_map: a device, or ``{"": device}``; ``auto`` is the GPU when there is one. None is the CPU. The model
                is never split over several devices.
            torch_dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``; None is float32, as in transformers 4.
            dtype: the newer name of ``torch_dtype``.
            revision: commit, branch or tag on the hub.
            trust_remote_code: changes nothing: no code of a checkpoint is run.

        Raises:
            InputError: an argument or the config is wrong.
            GuardUnavailable: the checkpoint cannot be had or does not fit.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise InputError("expected dtype or torch_dtype, not both", where="torch_dtype")
        wanted = dtype or torch_dtype or torch.float32
        return cls(load_stream(source, dtype=wanted, device=_device(device_map), revision=revision))

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def eval(self) -> Self:
        """Itself: it is always in this mode."""
        self.model.eval()
        return self

    def stream_moderate_from_ids(
        self, token_ids: int | Sequence[int] | Tensor, role: str, stream_state: StreamState | None = None
    ) -> tuple[Moderation, StreamState]:
        """Take the next tokens of a stream and read all of its positions with the heads of a role.

        Args:
            token_ids: one or more ids: an int, a list, or an integer tensor ``[]``, ``[n]`` or ``[1, n]``.
            role: ``user`` reads the heads for prompts, ``assistant`` those for responses; it may change between calls.
            stream_state: what the call before gave; None begins a stream.

        Returns:
            What the model says, with an entry for each position since the stream began (these tokens are the last
            ones), and the state for the next call.

        Raises:
            InputError: the role or the ids are wrong; the stream is as it was.
            SessionClosed: the stream was closed.
        """
        if role not in _ROLES:
            raise InputError("expected user or assistant", where="role")
        if stream_state is not None and stream_state._closed:
            raise SessionClosed("the stream is closed")
        if stream_state is not None and stream_state._model is not self.model:
            raise InputError("the stream belongs to another model", where="stream_state")
        ids = _row(token_ids)
        state = StreamState(self.model) if stream_state is None else stream_state
        state._append(ids, self._names)
        return _copy(state._said[role]), state

    def close_stream(self, stream_state: StreamState | None) -> None:
        """Free what a stream holds. Safe to call twice, and with None."""
        if stream_state is not None:
            stream_state._close()


def _copy(said: Moderation) -> Moderation:
    return Moderation(
        risk_level=said["risk_level"].copy(),
        risk_prob=said["risk_prob"].copy(),
        category=said["category"].copy(),
        category_prob=said["category_prob"].copy(),
    )


def _by_role(logits: StreamLogits) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "user": (logits.query_risk, logits.query_category),
        "assistant": (logits.risk, logits.category),
    }


def _extend(labels: list[str], rounded: list[float], logits: Tensor, names: Mapping[int, str]) -> None:
    """Add the winner at each position; its probability is computed in the type of the logits, as in the original."""
    best = torch.softmax(logits, dim=-1).max(dim=-1)
    labels += [names[index] for index in best.indices.tolist()]
    rounded += [round(probability, 2) for probability in best.values.tolist()]


def _names(model: Qwen3ForGuardModel, field: str) -> dict[int, str]:
    return {int(index): name for index, name in getattr(model.config, field).items()}


def _row(token_ids: int | Sequence[int] | Tensor) -> Tensor:
    """The ids as ``[n]``; `CachedText` refuses what is not a row of ids."""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError):
        raise InputError("expected token ids: an int, a list of ints or a tensor", where="token_ids") from None
    if ids.ndim == 0:
        return ids[None]
    return ids[0] if ids.ndim == 2 and len(ids) == 1 else ids


def _device(device_map: str | torch.device | Mapping[str, str | torch.device] | None) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise InputError("a model is not split over devices: expected one device", where="device_map")
        device_map = device_map[""]
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device_map or "cpu")
    except RuntimeError:
        raise InputError("expected auto or a device, as cpu or cuda:0", where="device_map") from None
