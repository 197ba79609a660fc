"""Qwen3Guard-Stream in vLLM: with Tidegate installed beside it, ``vllm serve`` takes a Stream checkpoint as it is.

vLLM loads this in each of its processes, through the entry points ``vllm.general_plugins`` and
``vllm.io_processor_plugins``, whatever it serves: so that all this does is to say what is where. The model is in
`tidegate.integrations.vllm_model`; how it is asked in `tidegate.integrations.vllm_requests`.

``/pooling`` serves it in two ways. An ``input`` gives the logits of all four heads at each token, ``[tokens, 23]``:
risks and categories of the heads for responses, then of those for prompts. ``data`` is what
`tidegate.guards.vllm_wire` says, where a text that goes on costs only what is new.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from vllm import ModelRegistry, PoolingParams
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from tidegate.guards.vllm_wire import PLUGIN
from tidegate.model.checkpoints import head_labels

__all__ = ["ARCHITECTURE", "StreamSettings", "register", "requests"]

ARCHITECTURE: Final = "Qwen3ForGuardModel"
_MODEL: Final = "tidegate.integrations.vllm_model:Qwen3ForGuardModel"
_REQUESTS: Final = "tidegate.integrations.vllm_requests.StreamRequests"
_NEEDED: Final = ("skip_reading_prefix_cache", "extra_kwargs")
"""What requests must be able to say: vLLM has it all since 0.32 at the latest."""

logger = logging.getLogger(f"vllm.{__name__}")


class StreamSettings(VerifyAndUpdateConfig):
    """What vLLM asks about a Stream checkpoint before it is loaded."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the labels of the heads, and let Tidegate answer requests that have ``data``.

        Raises:
            InputError: when a label map cannot be used; says which.
        """
        head_labels(model_config.hf_config.to_dict(), custom=_named(model_config.hf_config.to_dict()))
        model_config.io_processor_plugin = model_config.io_processor_plugin or PLUGIN

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Warn when every piece of a text will cost the whole text."""
        if not vllm_config.cache_config.enable_prefix_caching:
            logger.warning("Prefix caching is off: each piece of a stream will cost the whole stream again")


def register() -> None:
    """Tell vLLM of the architecture; may be called any number of times."""
    if lacking := [name for name in _NEEDED if not hasattr(PoolingParams(), name)]:
        logger.warning("Tidegate cannot serve Stream checkpoints here: this vLLM has no %s", " and no ".join(lacking))
        return
    ModelRegistry.register_model(ARCHITECTURE, _MODEL)
    MODELS_CONFIG_MAP[ARCHITECTURE] = StreamSettings


def requests() -> str:
    """Where vLLM finds the class that answers requests with ``data``."""
    return _REQUESTS


def _named(config: dict[str, Any]) -> set[str]:
    """All categories that a config names: what is served may have its own."""
    maps = (config.get(f"{branch}_category_map") for branch in ("response", "query"))
    return {str(name) for names in maps if isinstance(names, dict) for name in names.values()}
