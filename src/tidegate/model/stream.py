"""The Stream architecture: a Qwen3 backbone whose every position says how severe the text is up to there.

Two branches read the hidden state after the backbone's final norm: one for the prompt (``query_*``, read at the token
that ends the user's turn), one for the response (read at each of its tokens). A branch is a projection, an RMSNorm and
two linear heads: three risk levels, and eight (response) or nine (prompt) categories. Tensor names, shapes and config
fields are those of the released Qwen3Guard-Stream models (``Qwen3ForGuardModel``), so that their checkpoints load as
they are; the backbone is transformers' own, at any size. Method: Qwen3Guard Technical Report, section 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, Qwen3Config, Qwen3Model, Qwen3PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tidegate.model.checkpoints import SHORT_NAMES
from tidegate.types import PROMPT_CATEGORIES, RESPONSE_CATEGORIES, Severity

__all__ = [
    "GROUPED_ATTENTION",
    "Qwen3ForGuardModel",
    "StreamLogits",
    "attention_mask_for",
    "grouped_attention",
    "label_maps",
    "stream_config",
]

GROUPED_ATTENTION = "tidegate_grouped"
"""The name under which `grouped_attention` is known to transformers."""

OFFICIAL_RISK_ORDER = (Severity.SAFE, Severity.UNSAFE, Severity.CONTROVERSIAL)
"""The id order of the released risk heads, which is not the order of severity."""


class StreamLogits(NamedTuple):
    """Logits of the four heads, each ``[batch, positions, classes]`` in the dtype of the model."""

    risk: Tensor
    category: Tensor
    query_risk: Tensor
    query_category: Tensor


def label_maps() -> dict[str, dict[str, str]]:
    """The four label maps of the official config: id (as a string, as in JSON) to short name."""
    risk = {str(i): severity.label for i, severity in enumerate(OFFICIAL_RISK_ORDER)}
    response = {str(i): SHORT_NAMES.get(name, name) for i, name in enumerate(RESPONSE_CATEGORIES)}
    query = {str(i): SHORT_NAMES.get(name, name) for i, name in enumerate(PROMPT_CATEGORIES)}
    return {
        "response_risk_level_map": dict(risk),
        "query_risk_level_map": dict(risk),
        "response_category_map": response,
        "query_category_map": query,
    }


def stream_config(
    *,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    guard_inner_size: int,
    head_dim: int | None = None,
    max_position_embeddings: int = 8192,
    rope_theta: float = 1e6,
) -> Qwen3Config:
    """A config of the official form at any size; ``head_dim`` None means hidden_size / num_attention_heads."""
    return Qwen3Config(
        architectures=["Qwen3ForGuardModel"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size,
        head_dim=head_dim or hidden_size // num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        guard_inner_size=guard_inner_size,
        num_risk_level=3,
        num_query_risk_level=3,
        num_category=len(RESPONSE_CATEGORIES),
        num_query_category=len(PROMPT_CATEGORIES),
        **label_maps(),
    )


class Qwen3ForGuardModel(Qwen3PreTrainedModel):  # type: ignore[misc,unused-ignore]
    """A Qwen3 backbone with the two branches of Qwen3Guard-Stream.

    Args:
        config: a Qwen3Config that also has ``guard_inner_size``, ``num_risk_level``, ``num_category``,
            ``num_query_risk_level`` and ``num_query_category``.
    """

    config_class = Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        inner, eps = config.guard_inner_size, config.rms_norm_eps
        self.model = Qwen3Model(config)
        self.risk_level_category_pre = nn.Linear(config.hidden_size, inner, bias=False)
        self.risk_level_category_layernorm = Qwen3RMSNorm(inner, eps=eps)
        self.risk_level_head = nn.Linear(inner, config.num_risk_level, bias=False)
        self.category_head = nn.Linear(inner, config.num_category, bias=False)
        self.query_risk_level_category_pre = nn.Linear(config.hidden_size, inner, bias=False)
        self.query_risk_level_category_layernorm = Qwen3RMSNorm(inner, eps=eps)
        self.query_risk_level_head = nn.Linear(inner, config.num_query_risk_level, bias=False)
        self.query_category_head = nn.Linear(inner, config.num_query_category, bias=False)
        self.post_init()

    def heads(self, hidden: Tensor) -> StreamLogits:
        """All four heads on hidden states ``[batch, positions, hidden_size]`` taken after the final norm."""
        response = self.risk_level_category_layernorm(self.risk_level_category_pre(hidden))
        query = self.query_risk_level_category_layernorm(self.query_risk_level_category_pre(hidden))
        return StreamLogits(
            self.risk_level_head(response),
            self.category_head(response),
            self.query_risk_level_head(query),
            self.query_category_head(query),
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> StreamLogits:
        """Logits at every position of ``input_ids`` (int64 ``[batch, positions]``), causal.

        ``attention_mask`` None is right for sequences padded at their end: what follows a token cannot reach it. A
        boolean mask ``[batch, 1, positions, positions]`` says who sees whom, for several texts in one row, which then
        need ``position_ids`` of their own.
        """
        if attention_mask is not None:
            attention_mask = attention_mask_for(self.config, attention_mask, self.dtype)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return self.heads(output.last_hidden_state)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that never repeats keys: queries of one group are rows of one product.

    For use through transformers, by the name of `GROUPED_ATTENTION`. Method: Ainslie et al. 2023, "GQA: Training
    Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".

    Args:
        query: ``[batch, heads, positions, head_dim]``; the last positions of those that ``key`` has.
        key, value: ``[batch, key_heads, all positions, head_dim]``.
        attention_mask: boolean, ``[batch or 1, 1, positions, all positions]``, true where a position is seen. None
            means causal, for one position or for all of them.

    Returns:
        ``[batch, positions, heads, head_dim]``, and None.
    """
    batch, heads, positions, size = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None and positions > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
        return out.transpose(1, 2), None
    if attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    rows = query.reshape(batch, key.shape[1], groups * positions, size)
    out = F.scaled_dot_product_attention(rows, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, positions, size).transpose(1, 2), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)


def attention_mask_for(config: Qwen3Config, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as the attention of this config wants it.

    Eager attention adds its mask to the scores: a boolean one would leave what is hidden in sight.

    Args:
        seen: boolean, ``[batch or 1, 1, positions, all positions]``, true where a position is seen; a mask that is not
            boolean is given back as it is.
        dtype: of the model.
    """
    if config._attn_implementation != "eager" or seen.dtype != torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and those of the embedding table alone."""
    embedding = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" in name)
    return sum(p.numel() for p in model.parameters()), embedding


def as_float32(logits: StreamLogits) -> StreamLogits:
    """The same logits in float32."""
    return StreamLogits(*(part.to(torch.float32) for part in logits))
