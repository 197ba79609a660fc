"""An exported Gen model answers as its checkpoint does."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("transformers")

from gen_folder import FORMS, REASONED, ToyRow, gen_folder, toy_row, toy_rows, write_gen_folder  # noqa: E402
from stream_folder import tensors_of, tiny_model, write_checkpoint  # noqa: E402
from tidegate.errors import GuardUnavailable, InputError, UnreadableVerdict  # noqa: E402
from tidegate.model.answers import Scores  # noqa: E402
from tidegate.model.onnx_scoring import OnnxGenModel  # noqa: E402
from tidegate.model.scoring import GenModel  # noqa: E402
from tidegate.prompts import Form  # noqa: E402
from tidegate.train.export_backbone import PRECISIONS, export_backbone  # noqa: E402
from tidegate.types import Conversation, Role, Turn  # noqa: E402

MOST = {"fp32": 1e-5, "int8": 0.02, "int8-fast": 0.05, "int4": 0.6}
"""By how much a probability may differ from that of torch in float32."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxGenModel]:
    folder = tmp_path_factory.mktemp("exports")
    models = {}
    for precision in PRECISIONS:
        export_backbone(gen_folder(), folder / precision, precision=precision)
        models[precision] = OnnxGenModel.load(folder / precision, threads=2)
    return models


@pytest.fixture(scope="module")
def checkpoint() -> GenModel:
    return GenModel.load(str(gen_folder()))


def ids_of(model: GenModel | OnnxGenModel, row: ToyRow) -> list[int]:
    return model.ids(row.form.prompt(row.conversation))


def gap(one: Scores, other: Scores) -> float:
    """The largest difference of a probability."""
    assert one.words.keys() == other.words.keys()
    return max(
        abs(share - other.words[kind][word]) for kind, words in one.words.items() for word, share in words.items()
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_and_probabilities_are_those_of_the_checkpoint(
    exports: dict[str, OnnxGenModel], checkpoint: GenModel, precision: str
) -> None:
    answered = same = 0
    for form in FORMS:
        rows = [row for row in toy_rows(11, 60) if row.form is form]
        prompts = [ids_of(checkpoint, row) for row in rows]
        pairs = zip(checkpoint.score(form, prompts), exports[precision].score(form, prompts), strict=True)
        for expected, got in pairs:
            if isinstance(expected, Scores):
                answered += 1
                assert isinstance(got, Scores)
                same += got.answer == expected.answer
                if got.answer == expected.answer:
                    assert gap(expected, got) < MOST[precision]
    assert answered > 50
    assert same >= (answered if precision in ("fp32", "int8") else 0.95 * answered)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), precision=st.sampled_from(("int8", "int8-fast")))
def test_company_changes_nothing(exports: dict[str, OnnxGenModel], seed: int, count: int, precision: str) -> None:
    rng = random.Random(seed)
    form = rng.choice(FORMS)
    prompts = [ids_of(exports[precision], toy_row(rng, form)) for _ in range(count)]
    together = exports[precision].score(form, prompts)
    for prompt, got in zip(prompts, together, strict=True):
        (alone,) = exports[precision].score(form, [prompt])
        assert isinstance(alone, Scores) == isinstance(got, Scores)
        if isinstance(alone, Scores) and isinstance(got, Scores):
            assert got.answer == alone.answer
            assert gap(alone, got) < 1e-5


def test_long_prompts_and_what_comes_after_them(exports: dict[str, OnnxGenModel], checkpoint: GenModel) -> None:
    """Longer than a pass, and longer than the cache that is kept; then a short one again."""
    form = FORMS[0]
    for words in (1, 300, 900, 1):
        ids = checkpoint.ids(form.prompt(Conversation((Turn(Role.USER, "tell me of " + "bread and knife " * words),))))
        ((expected,), (got,)) = checkpoint.score(form, [ids]), exports["fp32"].score(form, [ids])
        assert isinstance(expected, Scores) == isinstance(got, Scores)
        if isinstance(expected, Scores) and isinstance(got, Scores):
            assert got.answer == expected.answer
            assert gap(expected, got) < 1e-4


def test_what_begins_otherwise_shares_nothing(exports: dict[str, OnnxGenModel], checkpoint: GenModel) -> None:
    rows = [row for row in toy_rows(3, 12) if row.form is REASONED]
    odd = [ids_of(checkpoint, row)[3:] for row in rows]
    for expected, got in zip(checkpoint.score(REASONED, odd), exports["fp32"].score(REASONED, odd), strict=True):
        assert type(expected) is type(got)
        if isinstance(expected, Scores) and isinstance(got, Scores):
            assert got.answer == expected.answer


def test_a_model_that_does_not_answer_in_its_form_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    write_gen_folder(tmp_path / "random", trained=False)
    export_backbone(tmp_path / "random", tmp_path / "out")
    model = OnnxGenModel.load(tmp_path / "out")
    (score,) = model.score(FORMS[0], [ids_of(model, toy_rows(1, 1)[0])])
    assert isinstance(score, UnreadableVerdict)


def test_what_is_not_a_number_is_unreadable(tmp_path: Path) -> None:
    export_backbone(gen_folder(), tmp_path / "out", precision="fp32")
    table = np.load(tmp_path / "out" / "embedding.npy")
    np.save(tmp_path / "out" / "embedding.npy", np.full_like(table, np.nan))
    model = OnnxGenModel.load(tmp_path / "out")
    (score,) = model.score(FORMS[0], [ids_of(model, toy_rows(1, 1)[0])])
    assert isinstance(score, UnreadableVerdict)


def test_adapters_and_other_kinds_are_refused(exports: dict[str, OnnxGenModel], tmp_path: Path) -> None:
    model = exports["int8"]
    with pytest.raises(InputError, match="adapter"):
        model.score(FORMS[0], [ids_of(model, toy_rows(1, 1)[0])], ["bank"])
    export_backbone(write_checkpoint(tmp_path / "c", tensors_of(tiny_model(3))), tmp_path / "out")
    with pytest.raises(GuardUnavailable, match="tokenizer"):
        OnnxGenModel.load(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_bytes((gen_folder() / "tokenizer.json").read_bytes())
    with pytest.raises(GuardUnavailable, match="stream model"):
        OnnxGenModel.load(tmp_path / "out")


def test_forms_take_turns_without_end(exports: dict[str, OnnxGenModel]) -> None:
    """More fixed beginnings than are kept."""
    model, row = exports["int8"], toy_rows(1, 1)[0]
    forms = [Form(**{**_fields(row.form), "opening": f"<|im_start|>user\nway {n}:\n\n"}) for n in range(6)]
    first = [model.score(form, [model.ids(form.prompt(row.conversation))]) for form in forms]
    again = [model.score(form, [model.ids(form.prompt(row.conversation))]) for form in forms]
    for (one,), (other,) in zip(first, again, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Scores) and isinstance(other, Scores):
            assert one.answer == other.answer


def _fields(form: Form) -> dict[str, object]:
    return {name: getattr(form, name) for name in form.__dataclass_fields__ if form.__dataclass_fields__[name].init}


def test_exports_are_computed_without_torch() -> None:
    """Of the project's modules that compute with an export, none needs torch."""
    program = "import sys, tidegate.model.onnx_scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
