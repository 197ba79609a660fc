"""The smallest released shape (0.6B, random weights), on demand: ``TIDEGATE_FULL_SIZE=1``; needs 3 GB of memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from stream_folder import official_config, write_checkpoint  # noqa: E402
from tidegate.model.cached import CachedText, probabilities  # noqa: E402
from tidegate.model.loading import load_stream  # noqa: E402
from tidegate.model.stream import Qwen3ForGuardModel, stream_config  # noqa: E402

pytestmark = pytest.mark.skipif("TIDEGATE_FULL_SIZE" not in os.environ, reason="only on demand: TIDEGATE_FULL_SIZE=1")

SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
    "guard_inner_size": 512,
    "head_dim": 128,
}
IDS = torch.randint(0, 151936, (200,), generator=torch.Generator().manual_seed(1))
CHUNKINGS = ([*range(1, 40), 100], [16 * n for n in range(1, 13)], [199])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in Qwen3ForGuardModel(stream_config(**SHAPE)).state_dict().items()
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).div_(shape[1] ** 0.5).bfloat16()
        for name, shape in shapes.items()
    }
    return write_checkpoint(tmp_path_factory.mktemp("full"), tensors, shards=2, config=official_config(**SHAPE))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_every_chunking_says_the_same_at_full_size(folder: Path, dtype: str, tolerance: float) -> None:
    model = load_stream(folder, dtype=dtype)
    with torch.inference_mode():
        expected = [probabilities(head[0]) for head in model(IDS[None])]
    for places in CHUNKINGS:
        text = CachedText(model)
        parts = [text.append(piece) for piece in IDS.tensor_split(places)]
        for head, whole in zip(zip(*parts, strict=True), expected, strict=True):
            got = probabilities(torch.cat(head))
            torch.testing.assert_close(got, whole, atol=tolerance, rtol=0)
            best = whole.topk(2).values
            clear = best[:, 0] - best[:, 1] > 2 * tolerance
            assert torch.equal(got.argmax(-1)[clear], whole.argmax(-1)[clear])
