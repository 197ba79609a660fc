"""What a `vllm-stream` guard and Tidegate's plugin in a vLLM server say to each other, in the ``data`` of ``/pooling``.

The guard sends all the ids of a text and says from which position on it wants to know (`Ask`). The answer (`Answer`)
holds a row of logits for each position that was computed, from the last one backwards, and no further back than was
wanted. It holds fewer rows than were wanted when the server had some of these positions in its prefix cache: logits are
not cached. The guard then asks again under a ``salt`` of its own, with which it shares no cache.

``{"describe": true}`` asks what is served (`Description`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tidegate.errors import UnreadableVerdict
from tidegate.types import Target

__all__ = ["DESCRIBE", "PATH", "PLUGIN", "Answer", "Ask", "Description", "read"]

PLUGIN: Final = "tidegate"
"""The name of the plugin that answers."""
PATH: Final = "/pooling"
DESCRIBE: Final[Mapping[str, bool]] = {"describe": True}

_LABELS: Final = ("response_risk_level_map", "response_category_map", "query_risk_level_map", "query_category_map")
_MOST_TOKENIZER: Final = 64 * 1024 * 1024
"""Bytes of the longest definition of a tokenizer that is unpacked."""
Count = Annotated[int, Field(ge=0)]
M = TypeVar("M", bound=BaseModel)


class Ask(BaseModel):
    """Judge these ids.

    Attributes:
        ids: all of them, from the beginning of the text; at least one.
        first: the first position whose logits are wanted.
        target: whose heads are read.
        salt: texts with different salts share no cache; "" shares with all that have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    first: Count = 0
    target: Target = Target.RESPONSE
    salt: Annotated[str, Field(max_length=100)] = ""

    @model_validator(mode="after")
    def _something_is_wanted(self) -> Self:
        if self.first >= len(self.ids):
            raise ValueError("first must be the number of one of the ids")
        return self


class Answer(BaseModel):
    """The logits of the last positions.

    Attributes:
        served: the same as in `Description`.
        computed: at how many positions the model computed for this.
        classes: how many levels of risk and how many categories there are.
        rows: float32, little-endian, in base64: for each position its risk logits, then its category logits.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    served: str
    computed: Count
    classes: tuple[Count, Count]
    rows: str

    @classmethod
    def of(cls, rows: NDArray[np.float32], classes: tuple[int, int], *, computed: int, served: str) -> Self:
        """Pack rows ``[positions, risks + categories]``."""
        packed = _packed(np.asarray(rows, "<f4").tobytes())
        return cls(served=served, computed=computed, classes=classes, rows=packed)

    def logits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Risk ``[positions, risks]`` and category logits ``[positions, categories]``.

        Raises:
            UnreadableVerdict: when there are not as many numbers as that, or one is not finite.
        """
        try:
            rows = np.frombuffer(_unpacked(self.rows), "<f4").astype(np.float32).reshape(-1, sum(self.classes))
        except (binascii.Error, ValueError):
            raise UnreadableVerdict("the server's logits cannot be read") from None
        if not np.isfinite(rows).all():
            raise UnreadableVerdict("the server computed something that is not a finite number")
        return rows[:, : self.classes[0]], rows[:, self.classes[0] :]


class Description(BaseModel):
    """What is served.

    Attributes:
        served: changes with all that answers mean: labels, window and tokenizer.
        model: its name on the server.
        config: of the checkpoint's config what says what the heads mean: the four label maps.
        window: most ids of one text.
        block: in blocks of how many positions the prefix cache works: so many less one may be computed again.
        caching: whether there is a prefix cache.
        tokenizer: the definition of the tokenizer, compressed with zlib, in base64; None when it cannot be had.
        versions: of what serves it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    served: str
    model: str
    config: dict[str, Any]
    window: Annotated[int, Field(ge=4)]
    block: Annotated[int, Field(ge=1)]
    caching: bool
    tokenizer: str | None = None
    versions: dict[str, str] = {}

    @classmethod
    def of(cls, config: Mapping[str, Any], window: int, definition: str | None, **more: Any) -> Self:
        """Describe a checkpoint by its config, the length of its window and its tokenizer."""
        labels = {name: config[name] for name in _LABELS}
        told = json.dumps([labels, window, definition], sort_keys=True)
        return cls(
            served=hashlib.sha256(told.encode()).hexdigest()[:16],
            config=labels,
            window=window,
            tokenizer=None if definition is None else _packed(zlib.compress(definition.encode())),
            **more,
        )

    def definition(self) -> str | None:
        """The definition of the tokenizer; None when the server has none to give.

        Raises:
            UnreadableVerdict: when it cannot be unpacked.
        """
        if self.tokenizer is None:
            return None
        try:
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(_unpacked(self.tokenizer), _MOST_TOKENIZER)
            if not unpacking.eof:
                raise ValueError("too long, or broken off")
            return data.decode()
        except (binascii.Error, zlib.error, ValueError):
            raise UnreadableVerdict("the server's tokenizer cannot be read") from None


def read(model: type[M], data: Any) -> M:
    """What a server answered.

    Raises:
        UnreadableVerdict: when it has another form.
    """
    try:
        return model.model_validate(data.get("data") if isinstance(data, dict) else None)
    except ValidationError:
        raise UnreadableVerdict(f"the server's answer does not come from the plugin {PLUGIN!r}") from None


def _packed(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unpacked(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
