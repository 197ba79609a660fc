"""The Stream architecture on vLLM's layers: its Qwen3 backbone, sharded as vLLM shards it, and the two head branches.

The heads are small (1 M of 597 M parameters at 0.6B) and are whole on every rank of a tensor-parallel group. They are
computed once for all the tokens of a step, and each request is given the rows that it asks for. Names of tensors, and
what is cast when, are those of the released models (`tidegate.model.stream`). There is no pipeline parallelism: the
model does not claim it, so that vLLM refuses it. A pipeline helps no model of this size, and makes each piece wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Final, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.pooling_params import PoolingParams
from vllm.sequence import IntermediateTensors
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from tidegate.types import Target

__all__ = ["FIRST", "TARGET", "Qwen3ForGuardModel", "StreamPooler"]

FIRST: Final = "tidegate_first"
"""Of the extra parameters of a request, the one that says which position is the first that is asked for."""
TARGET: Final = "tidegate_target"
"""And the one that says whose heads are read; without it, both branches are."""
_TASK: Final = "token_classify"
_HEADS: Final = ("", "query_")
_UNUSED: Final = "lm_head."
"""A checkpoint may have tensors of this name, and a guard does not need them."""


class _Part(NamedTuple):
    """Rows of one request that one step computed."""

    start: int
    rows: Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


class HeadNorm(nn.Module):
    """RMSNorm as the released models have it: brought back to the dtype of the input before the weight is applied."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize ``[tokens, size]``."""
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(hidden.dtype)


class StreamPooler(Pooler):
    """Gives each request its rows of logits, float32: those from its first position on that a step computed.

    Args:
        model: whose heads are read.
        classes: columns of the risk and the category head for responses, and of those for prompts.
    """

    def __init__(self, model: Qwen3ForGuardModel, classes: tuple[int, int, int, int]) -> None:
        super().__init__()
        self._logits = model.logits
        response = classes[0] + classes[1]
        self._columns = {
            None: slice(None),
            Target.RESPONSE.value: slice(0, response),
            Target.PROMPT.value: slice(response, None),
        }
        self._kept: WeakKeyDictionary[PoolingStates, list[_Part]] = WeakKeyDictionary()

    def get_supported_tasks(self) -> set[str]:
        """What vLLM calls this."""
        return {_TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """For each request ``[rows, columns]``, or None while its prompt is not computed to its end."""
        cursor = pooling_metadata.get_pooling_cursor()
        counts, stops = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        logits = torch.split(self._logits(hidden_states).float(), counts)
        given = zip(
            logits,
            stops,
            cursor.get_finished_mask(),
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            strict=True,
        )
        return [self._pooled(rows, stop, states, params, ends=ends) for rows, stop, ends, params, states in given]

    def _pooled(
        self, rows: Tensor, stop: int, states: PoolingStates, params: PoolingParams, *, ends: bool
    ) -> Tensor | None:
        asked: dict[str, Any] = params.extra_kwargs or {}
        start = max(stop - len(rows), min(stop, asked.get(FIRST, 0)))
        part = _Part(start, rows[len(rows) - (stop - start) :, self._columns[asked.get(TARGET)]])
        if not ends:
            self._kept.setdefault(states, []).append(part)
            return None
        return joined([*self._kept.pop(states, []), part]).contiguous()


def joined(parts: list[_Part]) -> Tensor:
    """The rows of the last positions without a gap, in order. Where parts overlap, the later one was computed last.

    A request that is put off in the middle of its prompt begins again, from what of it is in the cache.
    """
    rows = [parts[-1].rows]
    start = parts[-1].start
    for part in reversed(parts[:-1]):
        if part.start < start <= part.stop:
            rows.insert(0, part.rows[: start - part.start])
            start = part.start
    return torch.cat(rows)


class Qwen3ForGuardModel(nn.Module, SupportsLoRA):  # type: ignore[misc,unused-ignore]
    """A Qwen3 backbone with the two branches of Qwen3Guard-Stream."""

    is_pooling_model: ClassVar[Literal[True]] = True
    hf_to_vllm_mapper = Qwen3Model.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = Qwen3Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self._add_heads(prefix)
        classes = (config.num_risk_level, config.num_category, config.num_query_risk_level, config.num_query_category)
        self.pooler = StreamPooler(self, classes)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The embeddings ``[tokens, hidden_size]`` of ids ``[tokens]``."""
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[tokens, hidden_size]`` after the final norm."""
        hidden: Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """All four heads on hidden states ``[tokens, hidden_size]``, side by side: ``[tokens, 23]``."""
        columns = []
        for name in _HEADS:
            inner = getattr(self, f"{name}risk_level_category_layernorm")(
                getattr(self, f"{name}risk_level_category_pre")(hidden)
            )
            columns += [getattr(self, f"{name}risk_level_head")(inner), getattr(self, f"{name}category_head")(inner)]
        return torch.cat(columns, dim=-1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their released names; gives the names of the parameters that were loaded."""
        loaded: set[str] = AutoWeightsLoader(self, ignore_unexpected_prefixes=[_UNUSED]).load_weights(weights)
        return loaded

    def _add_heads(self, prefix: str) -> None:
        config, inner = self.config, self.config.guard_inner_size
        for name in _HEADS:
            sizes = {
                f"{name}risk_level_category_pre": (config.hidden_size, inner),
                f"{name}risk_level_head": (inner, getattr(config, f"num_{name}risk_level")),
                f"{name}category_head": (inner, getattr(config, f"num_{name}category")),
            }
            for layer, (wide, narrow) in sizes.items():
                linear = ReplicatedLinear(
                    wide, narrow, bias=False, return_bias=False, prefix=maybe_prefix(prefix, layer)
                )
                setattr(self, layer, linear)
            setattr(self, f"{name}risk_level_category_layernorm", HeadNorm(inner, config.rms_norm_eps))
