"""Gen answers with adapters: each prompt has those of its own adapter, whoever is beside it and whoever came before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from adapter_folder import random_tensors, turned, turned_adapter, write_adapter  # noqa: E402
from gen_folder import ABOUT_PROMPT, ABOUT_RESPONSE, REASONED, ToyRow, gen_folder, toy_rows  # noqa: E402
from tidegate.errors import GuardUnavailable, InputError, UnreadableVerdict  # noqa: E402
from tidegate.model import scoring  # noqa: E402
from tidegate.model.scoring import GenModel, Scores  # noqa: E402
from tidegate.types import Severity  # noqa: E402

NOISE = 1e-4
ROWS = [row for row in toy_rows(404, 60) if row.form is not REASONED]
ABOUT = {form: [row for row in ROWS if row.form is form] for form in (ABOUT_PROMPT, ABOUT_RESPONSE)}
Outcome = Scores | UnreadableVerdict


@pytest.fixture(scope="module")
def slight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moves probabilities, and no more."""
    folder = tmp_path_factory.mktemp("slight")
    targets = ["q_proj", "up_proj"]
    tensors = random_tensors(AutoModelForCausalLM.from_pretrained(gen_folder()), seed=1, targets=targets, size=0.05)
    return write_adapter(folder, tensors, target_modules=targets)


@pytest.fixture(scope="module")
def model(slight: Path) -> GenModel:
    return GenModel.load(str(gen_folder()), adapters={"turned": turned_adapter(), "slight": slight})


@pytest.fixture(scope="module")
def plain() -> GenModel:
    return GenModel.load(str(gen_folder()))


def score(model: GenModel, rows: Sequence[ToyRow], adapters: Sequence[str | None] | None = None) -> list[Outcome]:
    """Rows of one form, together."""
    prompts = [model.ids(row.form.prompt(row.conversation)) for row in rows]
    return model.score(rows[0].form, prompts, adapters)


def same(one: Outcome, other: Outcome, noise: float = NOISE) -> bool:
    if isinstance(one, UnreadableVerdict) or isinstance(other, UnreadableVerdict):
        return str(one) == str(other)
    return one.answer == other.answer and all(
        other.words[kind] == pytest.approx(words, abs=noise, rel=0) for kind, words in one.words.items()
    )


def severity(row: ToyRow, outcome: Outcome) -> Severity:
    assert isinstance(outcome, Scores), outcome
    return row.form.read(outcome.answer).severity


def test_an_adapter_says_what_it_has_learnt(model: GenModel) -> None:
    right = {None: 0, "turned": 0}
    for row in ROWS:
        for name in right:
            learnt = row if name is None else turned(row)
            (outcome,) = score(model, [row], [name])
            right[name] += severity(row, outcome) is row.form.parse(learnt.answer).severity
    assert min(right.values()) >= 0.9 * len(ROWS)


@pytest.mark.parametrize("form", ABOUT)
@settings(max_examples=25)
@given(data=st.data())
def test_rows_of_a_mixed_batch_are_as_each_alone(model: GenModel, form: object, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from([None, "turned", "slight"]), min_size=1, max_size=6))
    rows = [data.draw(st.sampled_from(ABOUT[form])) for _ in names]  # type: ignore[index]
    for row, name, outcome in zip(rows, names, score(model, rows, names), strict=True):
        assert same(outcome, score(model, [row], [name])[0])


def test_without_an_adapter_probabilities_are_those_of_a_guard_that_has_none(model: GenModel, plain: GenModel) -> None:
    """To the last bit."""
    for rows in ABOUT.values():
        assert score(model, rows) == score(plain, rows)
        assert score(model, rows, [None] * len(rows)) == score(plain, rows)
        for row in rows:
            score(model, [row], ["turned"])
            assert score(model, [row]) == score(plain, [row])


@pytest.mark.parametrize("first", [None, "turned", "slight"])
@pytest.mark.parametrize("then", [None, "turned", "slight"])
def test_what_prompts_begin_with_is_not_that_of_another_adapter(
    plain: GenModel, slight: Path, first: str | None, then: str | None
) -> None:
    """A prefix computed with one adapter, used with another, would tell of its tenant."""
    folders = {"turned": turned_adapter(), "slight": slight}
    rows = ABOUT[ABOUT_PROMPT][:6]
    fresh, used = GenModel.load(str(gen_folder()), adapters=folders), GenModel.load(str(gen_folder()), adapters=folders)
    score(used, rows, [first] * len(rows))
    assert score(used, rows, [then] * len(rows)) == score(fresh, rows, [then] * len(rows))
    used_layers = used._prefix(ABOUT_PROMPT, then).cache.layers
    for (keys, values), (other_keys, other_values) in zip(
        used_layers, fresh._prefix(ABOUT_PROMPT, then).cache.layers, strict=True
    ):
        assert torch.equal(keys, other_keys)
        assert torch.equal(values, other_values)
    if then is not None:
        assert not torch.equal(used_layers[-1][0], plain._prefix(ABOUT_PROMPT, None).cache.layers[-1][0])


def test_a_beginning_is_computed_once_with_each_adapter(model: GenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = GenModel(model._model, model._tokenizer)
    fresh._adapters = model._adapters
    runs: list[tuple[list[str | None], int]] = []
    run = fresh._run

    def noted(new: Any, wanted: Any) -> Any:
        runs.append(([each.adapter for each in new], max(len(each.ids) for each in new)))
        return run(new, wanted)

    monkeypatch.setattr(fresh, "_run", noted)
    rows = ABOUT[ABOUT_PROMPT][:3]
    for _ in range(2):
        score(fresh, rows, ["turned", None, "turned"])
    beginning = len(fresh.ids(ABOUT_PROMPT.fixed_beginning))
    assert runs.count(([None], beginning)) == runs.count((["turned"], beginning)) == 1
    assert [adapters for adapters, _ in runs].count([None, "turned", "turned"]) == 2


def test_beginnings_that_were_not_used_for_long_are_dropped(model: GenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_MOST_PREFIXES", 2)
    fresh = GenModel(model._model, model._tokenizer)
    fresh._adapters = model._adapters
    rows = ABOUT[ABOUT_PROMPT][:1]
    for name in (None, "turned", None, "slight"):
        score(fresh, rows, [name])
    assert [adapter for _, adapter in fresh._prefixes] == [None, "slight"]
    together = score(fresh, rows * 3, [None, "turned", "slight"])
    assert all(
        same(one, score(model, rows, [name])[0]) for one, name in zip(together, (None, "turned", "slight"), strict=True)
    )
    assert len(fresh._prefixes) == 2


@pytest.mark.parametrize("chunk", [1, 5])
def test_long_prompts_keep_their_adapter_in_every_part(
    model: GenModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows = ABOUT[ABOUT_RESPONSE][:4]
    names = ["slight", None, "turned", "slight"]
    whole = score(model, rows, names)
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    assert all(same(one, other) for one, other in zip(score(model, rows, names), whole, strict=True))


def test_names_of_adapters_are_told(model: GenModel, plain: GenModel) -> None:
    assert model.adapters == ("turned", "slight")
    assert plain.adapters == ()


def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardUnavailable, match=r"the adapter bank of .* cannot be used: adapter_config.json cannot be"):
        GenModel.load(str(gen_folder()), adapters={"bank": tmp_path})
    with pytest.raises(InputError, match="as the name of an adapter"):
        GenModel.load(str(gen_folder()), adapters={"my bank": tmp_path})
