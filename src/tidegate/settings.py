"""How this installation runs: the one place that reads the environment.

Every setting is an environment variable ``TIDEGATE_<NAME>``, or a keyword of `read_settings` (which is what a command
line option becomes). A ``TIDEGATE_`` variable that is not a setting is an error, because it is nearly always a typing
mistake in one that is. Secrets may also come from files: ``TIDEGATE_UPSTREAM_KEY_FILE=/run/secrets/key``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from tidegate.errors import SettingsError

__all__ = ["PREFIX", "Continues", "Settings", "read_settings"]

Continues = Literal["no", "vllm", "prefill"]
"""How an upstream goes on from the beginning of an answer."""

PREFIX: Final = "TIDEGATE_"
_SECRETS: Final = ("upstream_key", "fingerprint_key")
_IN_FILES: Final = (*_SECRETS, "database_url")
_UNSET_WHEN_EMPTY: Final = (*_SECRETS, "upstream_url", "spool", "keep_days", "confirm_guard")
_HIDDEN: Final = (*_SECRETS, "database_url", "upstream_url")
"""Settings whose value never appears in an error message: they are secret or may contain a password."""
_KEY: Final = re.compile("[0-9A-Fa-f]{64}")
_LONGEST_SECRET_FILE: Final = 64 * 1024

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseModel):
    """All settings, checked. Frozen; its repr shows no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that the server listens on. The default is reachable from this machine only."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port that the server listens on; 0 takes a free one."""
    upstream_url: str | None = None
    """Base URL of the OpenAI-compatible server behind the gateway, as ``http://127.0.0.1:8000/v1``; None for none."""
    upstream_key: SecretStr | None = None
    """Key sent to the upstream as a bearer token; None passes the client's own on."""
    guard: Annotated[str, Field(min_length=1)] = "edge"
    """Which guard judges, as `tidegate.guards.load_guard` takes it."""
    confirm_guard: Annotated[str | None, Field(min_length=1)] = None
    """Which guard confirms the alarms of streams, where the policy says ``confirm``; None for none."""
    confirm_timeout: Seconds = 20.0
    """Longest time that this guard may take for one answer, in seconds."""
    upstream_continues: Continues = "no"
    """How the upstream goes on from the beginning of an answer, for ``intervention: rollback``: ``vllm`` with
    ``continue_final_message``, ``prefill`` when the last turn is the assistant's, ``no`` cannot, and is asked to."""
    policy: Annotated[str, Field(min_length=1)] = "balanced"
    """A preset's name or the path of a policy file."""
    database_url: Annotated[str, Field(min_length=1, repr=False)] = "sqlite:///tidegate.db"
    """Where decisions are kept: ``sqlite:///file.db``, ``sqlite://`` (in memory only), ``postgresql://...``."""
    spool: Path | None = None
    """Folder where decisions wait while the database is down; None for one beside the database."""
    spool_bytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024
    """The most that the spool may hold, in bytes; 0 for no spool."""
    fingerprint_key: SecretStr | None = None
    """Key of the fingerprints, as 64 hexadecimal digits; None for one in a file that is made when there is none."""
    keep_days: Annotated[float | None, Field(gt=0, le=36_525)] = None
    """How old kept decisions may become, in days; None for any age."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 2 * 1024 * 1024
    """Longest request body that is read, in bytes."""
    guard_timeout: Seconds = 30.0
    """Longest time that a guard may take for one judgement, in seconds."""
    judge_system: bool = False
    """Whether system and developer turns are judged too, as if a user had written them."""
    client_timeout: Seconds = 60.0
    """Longest time that a client may take nothing of a streaming answer, in seconds; then it is given up."""
    upstream_connect_timeout: Seconds = 10.0
    """Longest time to connect to the upstream, in seconds."""
    upstream_read_timeout: Seconds = 300.0
    """Longest silence of the upstream within an answer, in seconds."""
    shutdown_timeout: Seconds = 30.0
    """How long open streams may go on when the server is told to stop, in seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of what is logged. User text is never logged."""

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("upstream_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError:
            raise ValueError("this is not a URL: expected something like http://127.0.0.1:8000/v1") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected a URL that starts with http:// or https://, as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"a URL must not hold a name or a password: give the key as {PREFIX}UPSTREAM_KEY")
        if parts.query or parts.fragment:
            raise ValueError("a base URL has no ?query and no #fragment")
        return value.rstrip("/")

    @field_validator("fingerprint_key")
    @classmethod
    def _of_digits(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _KEY.fullmatch(value.get_secret_value()):
            raise ValueError("expected 64 hexadecimal digits, as `openssl rand -hex 32` prints them")
        return value

    @field_validator("upstream_key")
    @classmethod
    def _header_safe(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
            raise ValueError("expected printable ASCII characters only (is there a line break in it?)")
        return value


def read_settings(environment: Mapping[str, str] | None = None, **given: Any) -> Settings:
    """Settings from keywords, then from the environment, then defaults.

    Args:
        environment: the variables to read; None for those of this process.
        given: values that go before the environment; None means not given.

    Raises:
        SettingsError: when a name is unknown or a value cannot be used; says which, and what was expected.
    """
    values = _from_environment(os.environ if environment is None else environment)
    for name, value in given.items():
        if name not in Settings.model_fields:
            raise SettingsError(f"unknown setting{_nearest(name, Settings.model_fields)}", where=name)
        if value is not None:
            values[name] = value
    try:
        return Settings(**values)
    except ValidationError as error:
        raise _explain(error, values, given) from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
    files = {f"{PREFIX}{name.upper()}_FILE": name for name in _IN_FILES}
    values: dict[str, Any] = {}
    for variable in sorted(environment):
        if not variable.startswith(PREFIX):
            continue
        if variable in known:
            values[known[variable]] = environment[variable]
        elif variable in files:
            if f"{PREFIX}{files[variable].upper()}" in environment:
                raise SettingsError("give the secret itself or its file, not both", where=variable)
            values[files[variable]] = _secret_from(environment[variable], variable)
        else:
            raise SettingsError(f"unknown setting{_nearest(variable, (*known, *files))}", where=variable)
    return {name: value for name, value in values.items() if value != "" or name not in _UNSET_WHEN_EMPTY}


def _secret_from(path: str, variable: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_LONGEST_SECRET_FILE).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SettingsError(f"cannot read the file {path!r}: {reason}", where=variable) from None


def _explain(error: ValidationError, values: Mapping[str, Any], given: Mapping[str, Any]) -> SettingsError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if name not in _HIDDEN:
        message = f"{message}, got {values[name]!r}"
    return SettingsError(message, where=name if given.get(name) is not None else f"{PREFIX}{name.upper()}")


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    short = {candidate.removeprefix(PREFIX): candidate for candidate in known}
    close = difflib.get_close_matches(name.removeprefix(PREFIX), list(short), n=1, cutoff=0.6)
    return f", did you mean {short[close[0]]}?" if close else f"; known: {', '.join(sorted(known))}"
