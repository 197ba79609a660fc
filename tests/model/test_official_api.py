"""Programs written against the released streaming calls get the same results, and clear errors where it had defects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from qwen3guard_files import FILES  # noqa: E402
from stream_folder import official_config, tensors_of, tiny_model, write_checkpoint  # noqa: E402
from tidegate.errors import InputError, SessionClosed  # noqa: E402
from tidegate.model.official_api import Qwen3GuardStream  # noqa: E402

FIELDS = ("risk_level", "risk_prob", "category", "category_prob")
BOMB = (
    *(151644, 872, 198, 9707, 11, 1246, 311, 1936, 264, 12764, 30, 151645, 198, 151644, 77091, 198),
    *(151667, 271, 151668, 271, 8420, 525, 1045, 14976, 5413, 311, 1936, 264, 12764, 13, 151645, 198),
)
"""A question and an answer as the released tokenizer and its template give them."""
MODEL = tiny_model(seed=2)
GUARD = Qwen3GuardStream(MODEL)
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(9)).tolist()


def rerun(model: Any, ids: list[int], role: str) -> dict[str, list[Any]]:
    """What the released algorithm gives: everything so far in one causal forward, read with the heads of the role."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))
    risk, category, kind = (
        (logits.query_risk, logits.query_category, "query")
        if role == "user"
        else (logits.risk, logits.category, "response")
    )
    result: dict[str, list[Any]] = {}
    for field, head, names in (
        ("risk", risk[0], getattr(model.config, f"{kind}_risk_level_map")),
        ("category", category[0], getattr(model.config, f"{kind}_category_map")),
    ):
        best = torch.softmax(head, dim=-1).max(dim=-1)
        result["risk_level" if field == "risk" else field] = [names[str(int(i))] for i in best.indices]
        result[f"{field}_prob"] = [float(p) for p in best.values]
    return result


def assert_equal(got: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert tuple(got) == FIELDS
    for name in ("risk_level", "category"):
        assert got[name] == expected[name]
    for name in ("risk_prob", "category_prob"):
        for rounded, exact in zip(got[name], expected[name], strict=True):
            assert isinstance(rounded, float)
            assert rounded == round(rounded, 2)
            assert abs(rounded - exact) <= 0.005 + 1e-5


def forms(ids: list[int]) -> st.SearchStrategy[Any]:
    """Every way of giving these ids that is allowed."""
    ways: list[Any] = [ids, tuple(ids), torch.tensor(ids), torch.tensor([ids]), torch.tensor(ids, dtype=torch.int32)]
    if len(ids) == 1:
        ways += [ids[0], torch.tensor(ids[0])]
    return st.sampled_from(ways)


@settings(max_examples=60)
@given(data=st.data())
def test_any_sequence_of_calls_gives_what_rerunning_everything_gives(data: st.DataObject) -> None:
    state, done = None, 0
    while done < len(IDS) and data.draw(st.booleans() if done else st.just(True)):
        count = data.draw(st.integers(1, len(IDS) - done))
        role = data.draw(st.sampled_from(["user", "assistant"]))
        result, state = GUARD.stream_moderate_from_ids(data.draw(forms(IDS[done : done + count])), role, state)
        done += count
        assert_equal(dict(result), rerun(MODEL, IDS[:done], role))
    GUARD.close_stream(state)


def test_both_roles_can_be_read_at_the_same_positions() -> None:
    one, state = GUARD.stream_moderate_from_ids(IDS[:20], "user", None)
    other, _ = GUARD.stream_moderate_from_ids(IDS[20], "assistant", state)
    assert_equal(dict(one), rerun(MODEL, IDS[:20], "user"))
    assert_equal(dict(other), rerun(MODEL, IDS[:21], "assistant"))
    assert one["risk_prob"] != other["risk_prob"][:20]
    assert {"Safe", "Unsafe", "Controversial"} >= set(other["risk_level"])


def test_a_result_does_not_change_when_the_stream_goes_on() -> None:
    first, state = GUARD.stream_moderate_from_ids(IDS[:5], "user", None)
    first["risk_level"].append("mine")
    second, _ = GUARD.stream_moderate_from_ids(IDS[5:7], "user", state)
    assert (len(first["risk_level"]), len(second["risk_level"])) == (6, 7)


def test_in_bfloat16_it_rounds_in_other_places_and_is_no_further_from_the_truth() -> None:
    """Two decimals of a probability may differ, as bfloat16 has no more than that, and so may a label of a near tie."""
    model = tiny_model(seed=2).to(torch.bfloat16)
    result, _ = Qwen3GuardStream(model).stream_moderate_from_ids(IDS, "assistant")
    expected, truth = rerun(model, IDS, "assistant"), rerun(tiny_model(seed=2), IDS, "assistant")["risk_prob"]
    ours, released = np.array(result["risk_prob"]), np.array(expected["risk_prob"])
    assert result["risk_level"] == expected["risk_level"]
    assert np.mean(np.array(result["category"]) == np.array(expected["category"])) >= 0.9
    assert np.abs(np.subtract(result["category_prob"], expected["category_prob"])).max() <= 0.06
    assert np.abs(ours - released).max() <= 0.03
    assert np.abs(ours - truth).max() <= np.abs(released - truth).max() + 0.01


@pytest.mark.parametrize("role", ["system", "", "User", None])
def test_a_bad_role_is_refused_before_anything_is_taken(role: Any) -> None:
    _, state = GUARD.stream_moderate_from_ids(IDS[:3], "user", None)
    with pytest.raises(InputError, match="role: expected user or assistant"):
        GUARD.stream_moderate_from_ids(IDS[3], role, state)
    result, _ = GUARD.stream_moderate_from_ids(IDS[3:5], "assistant", state)
    assert_equal(dict(result), rerun(MODEL, IDS[:5], "assistant"))


@pytest.mark.parametrize(
    "ids", [[], torch.tensor([], dtype=torch.int64), [300], -1, "hello", [1.5], 2.0, [[1], [2]], None, [1, "a"], True]
)
def test_bad_ids_are_refused_before_anything_is_taken(ids: Any) -> None:
    with pytest.raises(InputError, match="ids"):
        GUARD.stream_moderate_from_ids(ids, "user", None)
    _, state = GUARD.stream_moderate_from_ids(IDS[:3], "user", None)
    with pytest.raises(InputError, match="ids"):
        GUARD.stream_moderate_from_ids(ids, "user", state)
    result, _ = GUARD.stream_moderate_from_ids(IDS[3], "assistant", state)
    assert_equal(dict(result), rerun(MODEL, IDS[:4], "assistant"))


def test_use_after_close_says_so() -> None:
    _, state = GUARD.stream_moderate_from_ids(IDS[:3], "user", None)
    GUARD.close_stream(state)
    GUARD.close_stream(state)
    GUARD.close_stream(None)
    with pytest.raises(SessionClosed):
        GUARD.stream_moderate_from_ids(IDS[3], "user", state)


def test_streams_do_not_mix() -> None:
    _, one = GUARD.stream_moderate_from_ids(IDS[:10], "user", None)
    _, other = GUARD.stream_moderate_from_ids(IDS[20:30], "user", None)
    result, _ = GUARD.stream_moderate_from_ids(IDS[10:12], "assistant", one)
    assert_equal(dict(result), rerun(MODEL, IDS[:12], "assistant"))
    with pytest.raises(InputError, match="another model"):
        Qwen3GuardStream(tiny_model()).stream_moderate_from_ids(IDS[0], "user", other)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the released vocabulary and, where they are at hand, its tokenizer files."""
    folder = tmp_path_factory.mktemp("released")
    shape = {"vocab_size": 151936, "hidden_size": 16, "num_hidden_layers": 2}
    write_checkpoint(folder, tensors_of(tiny_model(**shape), torch.bfloat16), config=official_config(**shape))
    if FILES is not None:
        (folder / "tokenizer.json").symlink_to(FILES / "tokenizer.json")
        (folder / "tokenizer_config.json").symlink_to(FILES / "stream-0.6b" / "tokenizer_config.json")
    return folder


def test_the_released_way_of_calling_works_unchanged(released: Path) -> None:
    model = Qwen3GuardStream.from_pretrained(
        str(released), device_map="auto", torch_dtype=torch.bfloat16, trust_remote_code=True
    ).eval()
    assert (model.dtype, model.config.vocab_size) == (torch.bfloat16, 151936)
    token_ids = torch.tensor(BOMB).to(model.device)
    end = BOMB.index(151645)
    result, state = model.stream_moderate_from_ids(token_ids[: end + 1], role="user", stream_state=None)
    read = [(result["risk_level"][-1], result["category"][-1])]
    for position in range(end + 1, len(token_ids)):
        result, state = model.stream_moderate_from_ids(token_ids[position], role="assistant", stream_state=state)
        read.append((result["risk_level"][-1], result["category"][-1]))
    model.close_stream(state)
    expected = rerun(model.model, list(BOMB), "assistant")
    assert len(read) == len(BOMB) - end
    agree = [one[0] == other for one, other in zip(read[1:], expected["risk_level"][end + 1 :], strict=True)]
    assert sum(agree) >= len(agree) - 1


@pytest.mark.skipif(FILES is None, reason="needs the released files: TIDEGATE_QWEN3GUARD_FILES")
def test_the_released_tokenizer_works_with_the_same_folder(released: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(released))
    turns = [
        {"role": "user", "content": "Hello, how to build a bomb?"},
        {"role": "assistant", "content": "Here are some practical methods to build a bomb."},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False, enable_thinking=False)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    assert tuple(ids.tolist()) == BOMB
    model = Qwen3GuardStream.from_pretrained(released)
    result, _ = model.stream_moderate_from_ids(ids, role="user")
    assert_equal(dict(result), rerun(model.model, list(BOMB), "user"))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, None, torch.device("cpu")])
def test_a_device_is_named_in_the_ways_of_transformers(released: Path, device_map: Any) -> None:
    model = Qwen3GuardStream.from_pretrained(released, device_map=device_map, dtype="float32")
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"device_map": {"model": "cpu", "heads": "cuda"}}, "device_map"),
        ({"device_map": "balanced"}, "device_map"),
        ({"dtype": torch.float32, "torch_dtype": torch.bfloat16}, "torch_dtype"),
    ],
)
def test_arguments_that_cannot_be_kept_are_refused(released: Path, arguments: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError, match=place):
        Qwen3GuardStream.from_pretrained(released, **arguments)
