"""What vLLM is given: rows for each request, whatever it computes in one step. Runs where vLLM is installed.

A server as a whole is under test in ``tests/servers/test_vllm.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import numpy as np  # noqa: E402
from vllm import ModelRegistry, PoolingParams  # noqa: E402
from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # noqa: E402
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates  # noqa: E402

from tidegate.errors import InputError  # noqa: E402
from tidegate.guards.vllm_wire import DESCRIBE, PLUGIN  # noqa: E402
from tidegate.integrations.vllm import ARCHITECTURE, StreamSettings, register, requests  # noqa: E402
from tidegate.integrations.vllm_model import FIRST, TARGET, HeadNorm, StreamPooler, _Part, joined  # noqa: E402
from tidegate.integrations.vllm_requests import StreamRequests  # noqa: E402
from tidegate.model.stream import Qwen3RMSNorm, label_maps  # noqa: E402
from tidegate.types import Target  # noqa: E402


class Positions:
    """A model whose logits say at which position they are, and in which column."""

    def logits(self, hidden: Any) -> Any:
        return hidden[:, :1] * 100 + torch.arange(23)


def step(pooler: StreamPooler, *requests: tuple[int, int, int, dict[str, Any] | None, PoolingStates]) -> list[Any]:
    """One step: for each request its length, from where to where it is computed, what it asks, and its state."""
    metadata = PoolingMetadata(
        prompt_lens=torch.tensor([length for length, *_ in requests]),
        prompt_token_ids=None,
        prompt_token_ids_cpu=None,
        pooling_params=[PoolingParams(task="token_classify", extra_kwargs=asked) for *_, asked, _ in requests],
        pooling_states=[states for *_, states in requests],
    )
    counts = np.array([stop - start for _, start, stop, _, _ in requests], np.int32)
    stops = torch.tensor([stop for _, _, stop, _, _ in requests])
    metadata.build_pooling_cursor(counts, stops, torch.device("cpu"))
    hidden = torch.cat([torch.arange(start, stop) for _, start, stop, _, _ in requests])[:, None].float()
    return pooler(hidden, metadata)


def positions(rows: Any) -> list[int]:
    return [int(row[0]) // 100 for row in rows]


@pytest.fixture
def pooler() -> StreamPooler:
    return StreamPooler(Positions(), (3, 8, 3, 9))


def asks(first: int, target: Target = Target.RESPONSE) -> dict[str, Any]:
    return {FIRST: first, TARGET: target.value}


def test_each_request_of_a_step_is_given_the_rows_and_the_branch_that_it_asks_for(pooler: StreamPooler) -> None:
    response, prompt, plain, cached = step(
        pooler,
        (10, 0, 10, asks(7), PoolingStates()),
        (6, 4, 6, asks(5, Target.PROMPT), PoolingStates()),
        (3, 0, 3, None, PoolingStates()),
        (20, 16, 20, asks(10), PoolingStates()),
    )

    assert positions(response) == [7, 8, 9]
    assert response.shape == (3, 11)
    assert prompt.tolist() == [[500 + column for column in range(11, 23)]]
    assert plain.shape == (3, 23)
    assert positions(cached) == [16, 17, 18, 19]


def test_a_prompt_that_takes_several_steps_is_given_its_rows_at_the_end(pooler: StreamPooler) -> None:
    states = PoolingStates()

    assert step(pooler, (12, 0, 5, asks(3), states)) == [None]
    assert step(pooler, (12, 5, 8, asks(3), states)) == [None]
    (rows,) = step(pooler, (12, 8, 12, asks(3), states))

    assert positions(rows) == list(range(3, 12))


def test_a_prompt_that_is_put_off_and_begins_again_is_given_each_row_once(pooler: StreamPooler) -> None:
    states = PoolingStates()
    step(pooler, (12, 0, 5, asks(1), states))
    step(pooler, (12, 4, 8, asks(1), states))

    (rows,) = step(pooler, (12, 8, 12, asks(1), states))

    assert positions(rows) == list(range(1, 12))


def test_rows_behind_a_gap_are_not_joined_to_those_before_it() -> None:
    parts = [_Part(0, torch.arange(0, 4)), _Part(6, torch.arange(6, 9)), _Part(9, torch.arange(9, 11))]

    assert joined(parts).tolist() == [6, 7, 8, 9, 10]


def test_nothing_is_kept_of_a_request_that_is_gone(pooler: StreamPooler) -> None:
    states = PoolingStates()
    step(pooler, (12, 0, 5, asks(1), states))
    del states

    assert not pooler._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_heads_is_that_of_the_released_models(dtype: Any) -> None:
    ours, theirs = HeadNorm(24, 1e-6).to(dtype), Qwen3RMSNorm(24, eps=1e-6).to(dtype)
    weight = torch.rand(24).to(dtype)
    ours.weight.data, theirs.weight.data = weight, weight
    hidden = torch.randn(5, 24).to(dtype)

    assert torch.equal(ours(hidden), theirs(hidden))


def test_the_architecture_is_registered_and_answers_requests_with_data() -> None:
    register()
    register()

    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    assert MODELS_CONFIG_MAP[ARCHITECTURE] is StreamSettings
    module, _, name = requests().rpartition(".")
    assert (module, name) == (StreamRequests.__module__, StreamRequests.__name__)


class ModelConfig:
    """As much of vLLM's as is read before a model is loaded."""

    def __init__(self, plugin: str | None = None, **changes: Any) -> None:
        self.io_processor_plugin = plugin
        self._maps = {**label_maps(), **changes}
        self.hf_config = self

    def to_dict(self) -> dict[str, Any]:
        return self._maps


def test_a_checkpoint_is_asked_through_the_plugin_unless_another_one_is_named() -> None:
    plain, other = ModelConfig(), ModelConfig("other")
    for config in (plain, other):
        StreamSettings.verify_and_update_model_config(config)

    assert (plain.io_processor_plugin, other.io_processor_plugin) == (PLUGIN, "other")


def test_labels_that_cannot_be_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="query_risk_level_map"):
        StreamSettings.verify_and_update_model_config(ModelConfig(query_risk_level_map={"0": "Safe"}))
    own = {**label_maps()["response_category_map"], "7": "Rudeness"}
    StreamSettings.verify_and_update_model_config(ModelConfig(response_category_map=own))


@pytest.fixture
def answering() -> StreamRequests:
    return StreamRequests.__new__(StreamRequests)


def test_what_is_asked_reaches_the_engine(answering: StreamRequests) -> None:
    ask = answering.parse_data({"ids": [5, 6, 7], "first": 2, "target": "prompt", "salt": "x"})
    prompt = answering.pre_process(ask)
    params = answering.merge_pooling_params()

    assert prompt == {"prompt_token_ids": [5, 6, 7], "cache_salt": "x"}
    assert params.extra_kwargs == asks(2, Target.PROMPT)
    assert (params.task, params.skip_reading_prefix_cache) == ("token_classify", False)
    assert answering.parse_data(dict(DESCRIBE)) is None


@pytest.mark.parametrize("data", [None, "x", {"ids": []}, {"ids": ["secret"]}, {"ids": [1], "secret": 1}])
def test_what_cannot_be_asked_is_refused_without_repeating_it(answering: StreamRequests, data: Any) -> None:
    with pytest.raises(ValueError, match=r"^data") as refused:
        answering.parse_data(data)
    assert "'secret'" not in str(refused.value)
