"""Read the file that a guard's spec names: YAML or JSON into a pydantic model, and errors that say where.

Unknown and repeated keys, aliases and several documents are refused, as in policies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tidegate.errors import InputError

__all__ = ["read_spec_file"]

MAX_BYTES: Final = 64 * 1024
M = TypeVar("M", bound=BaseModel)


def read_spec_file(path: Path, model: type[M]) -> M:
    """The content of a file as a model.

    Args:
        path: ``.json`` is read as JSON, everything else as YAML.
        model: what it must be; should forbid extra keys.

    Raises:
        InputError: when the file cannot be read or is not of the form; ``where`` is ``file:line:column``.
    """
    text = _text(path)
    if path.suffix.lower() == ".json":
        _check_json(text, path)
        text = text.replace("\t", " ")
    node = _compose(text, path)
    _refuse_repeated(node, path)
    try:
        return model.model_validate(yaml.SafeLoader("").construct_document(node))
    except yaml.MarkedYAMLError as error:
        raise InputError(f"this is not YAML: {error.problem}", where=_place(path, error.problem_mark)) from None
    except ValidationError as error:
        raise _explained(error, node, path) from None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror or type(error).__name__}", where=str(path)) from None
    if len(data) > MAX_BYTES:
        raise InputError(f"the file is longer than {MAX_BYTES:,} bytes", where=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError("this is not UTF-8", where=f"{path}:{line}") from None


def _check_json(text: str, path: Path) -> None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"this is not JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise InputError("nested too deep", where=str(path)) from None


def _compose(text: str, path: Path) -> yaml.Node:
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError("YAML aliases (*name) are not allowed", where=_place(path, event.start_mark))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError("a character that YAML does not allow", where=f"{path}:{line}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"this is not YAML: {error.problem or error.context}", where=_place(path, mark)) from None
    except RecursionError:
        raise InputError("nested too deep", where=str(path)) from None
    if not isinstance(node, yaml.MappingNode):
        raise InputError("expected a mapping", where=str(path))
    return node


def _refuse_repeated(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated(child, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError("expected a word as key", where=_place(path, key.start_mark))
        if key.value in seen:
            raise InputError(f"the key {key.value!r} is given twice", where=_place(path, key.start_mark))
        seen.add(key.value)
        _refuse_repeated(value, path)


def _explained(error: ValidationError, node: yaml.Node, path: Path) -> InputError:
    errors = error.errors(include_url=False, include_input=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    if first["type"] == "missing":
        message = "this key is missing"
    keys = ".".join(str(part) for part in first["loc"])
    message = message[:1].lower() + message[1:]
    return InputError(f"{keys}: {message}" if keys else message, where=_place(path, _mark(node, first["loc"])))


def _mark(node: yaml.Node, places: Sequence[int | str]) -> Any:
    """Where in the text the deepest part of a path stands that is there."""
    mark = node.start_mark
    for place in places:
        if isinstance(node, yaml.SequenceNode) and isinstance(place, int) and place < len(node.value):
            node = node.value[place]
            mark = node.start_mark
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == str(place)), None)
        if found is None:
            break
        mark, node = found[0].start_mark, found[1]
    return mark


def _place(path: Path, mark: Any) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
