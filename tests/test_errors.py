from __future__ import annotations

import inspect

import pytest

from tidegate import errors

EVERY = [getattr(errors, name) for name in errors.__all__]


def test_every_exception_is_exported_and_drawn_in_the_docstring_below_its_parent() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}

    assert set(errors.__all__) == defined
    assert list(errors.__all__) == sorted(errors.__all__)
    drawing = inspect.getdoc(errors) or ""
    for name in defined:
        assert name in drawing


def test_one_except_clause_catches_everything_that_is_raised_on_purpose() -> None:
    assert all(issubclass(one, errors.TidegateError) for one in EVERY)


@pytest.mark.parametrize(
    "name", ["GuardUnavailable", "GuardOverloaded", "GuardTimeout", "SessionClosed", "UnreadableVerdict"]
)
def test_every_way_that_a_guard_fails_is_a_guard_error_and_not_an_input_error(name: str) -> None:
    kind = getattr(errors, name)

    assert issubclass(kind, errors.GuardError)
    assert not issubclass(kind, errors.InputError)


def test_an_input_error_says_where_and_what() -> None:
    error = errors.PolicyError("unknown key", where="a.yaml:3:1")

    assert str(error) == "a.yaml:3:1: unknown key"
    assert (error.where, error.message) == ("a.yaml:3:1", "unknown key")
    assert isinstance(error, errors.InputError)


def test_an_input_error_about_the_whole_has_no_place() -> None:
    error = errors.InputError("nothing given")

    assert str(error) == "nothing given"
    assert error.where is None


def test_an_upstream_error_carries_the_status_when_there_was_one() -> None:
    assert errors.UpstreamError("refused").status is None
    assert errors.UpstreamError("refused", status=503).status == 503
