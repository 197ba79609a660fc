"""How this installation runs: the one place that reads the environment.

Every setting is an environment variable ``TIDEGATE_<NAME>``, or a keyword of `read_settings` (which is what a command
line option becomes). A ``TIDEGATE_`` variable that is not a setting is an error, because it is nearly always a typing
mistake in one that is. Secrets may also come from files: ``TIDEGATE_UPSTREAM_KEY_FILE=/run/secrets/key``.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, field_validator

from tidegate.errors import SettingsError

__all__ = ["PREFIX", "Continues", "LogFormat", "Settings", "log_format_asked", "read_settings"]

Continues = Literal["no", "vllm", "prefill"]
"""How an upstream goes on from the beginning of an answer."""

LogFormat = Literal["text", "json"]

PREFIX: Final = "TIDEGATE_"
_SECRETS: Final = ("upstream_key", "fingerprint_key")
_IN_FILES: Final = (*_SECRETS, "database_url", "redis_url")
_LIMITS: Final = ("tenant_per_minute", "tenant_burst", "tenant_concurrent")
_TLS: Final = ("tls_cert", "tls_key", "tls_client_ca")
_UNSET_WHEN_EMPTY: Final = (
    *_SECRETS,
    "upstream_url",
    "spool",
    "keep_days",
    "confirm_guard",
    "webhooks",
    "auth",
    "redis_url",
    "open_doors",
    "adapters",
    "allowed_hosts",
    "trusted_fields",
    *_LIMITS,
    *_TLS,
)
_HIDDEN: Final = (*_SECRETS, "database_url", "upstream_url", "redis_url")
"""Settings whose value never appears in an error message: they are secret or may contain a password."""
_KEY: Final = re.compile("[0-9A-Fa-f]{64}")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONGEST_SECRET_FILE: Final = 64 * 1024

_LOCAL_HOSTS: Final = ("localhost", "ip6-localhost")

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Amount = Annotated[int | None, Field(ge=1, le=1_000_000_000)]
Auth = Literal["none", "keys"]


class Settings(BaseModel):
    """All settings, checked. Frozen; its repr shows no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    _given_as: dict[str, str] = PrivateAttr(default_factory=dict)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that the server listens on. The default is reachable from this machine only."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port that the server listens on; 0 takes a free one."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of processes that serve; several need a database that is not in memory only."""
    upstream_url: str | None = None
    """Base URL of the OpenAI-compatible server behind the gateway, as ``http://127.0.0.1:8000/v1``; None for none."""
    upstream_key: SecretStr | None = None
    """Key sent to the upstream as a bearer token; None passes the client's own on."""
    auth: Auth | None = None
    """Who is let in: ``none`` everybody, ``keys`` those who show a key; None for everybody of this machine."""
    open_doors: tuple[str, ...] | None = None
    """Doors that need no key: ``metrics``, ``console``; None for none."""
    keys_max_age: Seconds = 3600.0
    """How long known keys stay good while they cannot be read, in seconds."""
    tenant_per_minute: Amount = None
    """Requests per minute of each tenant, with all of its keys; None for any number."""
    tenant_burst: Amount = None
    """Requests of a tenant that may come at once after a pause; None for a sixth of those per minute."""
    tenant_concurrent: Amount = None
    """Exchanges of a tenant that may be open at once; None for any number."""
    subject_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    """Requests per minute that a subject starts from when it is throttled."""
    throttle_factor: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
    """By what these are multiplied, each time that a policy advises to throttle the subject."""
    throttle_seconds: Seconds = 300.0
    """How long a subject is throttled after the last such advice, in seconds."""
    redis_url: Annotated[str | None, Field(repr=False)] = None
    """The Redis that gateways share, as ``redis://127.0.0.1:6379/0``; None for none."""
    verdict_memory: Annotated[int, Field(ge=0, le=10_000_000)] = 4096
    """Verdicts that each process remembers; 0 for none."""
    verdict_memory_seconds: Seconds = 600.0
    """How long a verdict is remembered, in seconds."""
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Connections that may be open at once."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = 32 * 1024
    """Longest head of a request, in bytes."""
    max_headers: Annotated[int, Field(ge=8, le=10_000)] = 100
    """Most headers of a request."""
    header_timeout: Seconds = 10.0
    """How long the head of a request may take to come, in seconds."""
    read_timeout: Seconds = 60.0
    """How long a whole request may take to come, in seconds."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that the gateway answers to, as ``gate.example.com`` or ``*.example.com``; None for any."""
    tls_cert: Path | None = None
    """Certificate of the server, and its chain, in PEM; None for plain HTTP."""
    tls_key: Path | None = None
    """Private key of the certificate, in PEM; None when it is in the same file."""
    tls_client_ca: Path | None = None
    """Certificates of those who sign the clients', in PEM; None lets clients have none."""
    guard: Annotated[str, Field(min_length=1)] = "edge"
    """Which guard judges, as `tidegate.guards.load_guard` takes it."""
    confirm_guard: Annotated[str | None, Field(min_length=1)] = None
    """Which guard confirms the alarms of streams, where the policy says ``confirm``; None for none."""
    confirm_timeout: Seconds = 20.0
    """Longest time that this guard may take for one answer, in seconds."""
    upstream_continues: Continues = "no"
    """How the upstream goes on from the beginning of an answer, for ``intervention: rollback``: ``vllm`` with
    ``continue_final_message``, ``prefill`` when the last turn is the assistant's, ``no`` cannot, and is asked to."""
    adapters: dict[str, Path] | None = None
    """Adapters of a ``gen:`` guard, by the names that keys have, as ``bank=adapters/bank,school=adapters/school``."""
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
    max_stream_bytes: Annotated[int, Field(ge=1024, le=1 << 40)] = 128 * 1024 * 1024
    """Longest streaming answer of the upstream, in bytes, because its text is held for its decision."""
    guard_timeout: Seconds = 30.0
    """Longest time that a guard may take for one judgement, in seconds."""
    judge_system: bool = False
    """Whether system and developer turns are judged too, as if a user had written them."""
    trusted_fields: tuple[str, ...] | None = None
    """Names of fields of the upstream's answers that Tidegate does not know, but that carry no text of the model, with
    commas between: they pass as they are. None for none."""
    client_timeout: Seconds = 60.0
    """Longest time that a client may take nothing of a streaming answer, in seconds; then it is given up."""
    upstream_connect_timeout: Seconds = 10.0
    """Longest time to connect to the upstream, in seconds."""
    upstream_read_timeout: Seconds = 300.0
    """Longest silence of the upstream within an answer, in seconds."""
    shutdown_timeout: Seconds = 30.0
    """How long open streams may go on when the server is told to stop, in seconds."""
    webhooks: Path | None = None
    """File that says which webhooks are told of which decisions; None for none."""
    traces: Literal["none", "otlp"] = "none"
    """Where traces go: ``otlp`` sends them where the ``OTEL_`` variables say."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of what is logged. User text is never logged."""
    log_format: LogFormat = "text"
    """Lines of text, or one JSON object a line."""
    access_log: bool = False
    """Whether each request is a line of the log, with its route and status; at ``debug`` they are anyway."""

    @field_validator("open_doors", "allowed_hosts", "trusted_fields", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value

    @field_validator("trusted_fields")
    @classmethod
    def _field_names(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if not all(_FIELD_NAME.fullmatch(name) for name in value or ()):
            raise ValueError("expected names of fields, with commas between")
        return value

    @field_validator("open_doors")
    @classmethod
    def _openable(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if not set(value or ()) <= {"metrics", "console"}:
            raise ValueError("expected metrics, console, or both with a comma between")
        return value

    @field_validator("adapters", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [each.partition("=") for each in value.split(",") if each.strip()]
        if not all(name.strip() and folder.strip() for name, _, folder in pairs):
            raise ValueError("expected names and folders, as bank=adapters/bank,school=adapters/school")
        return {name.strip(): folder.strip() for name, _, folder in pairs}

    @field_validator("tls_cert", "tls_key", "tls_client_ca")
    @classmethod
    def _there(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError("there is no such file")
        return value

    def called(self, name: str) -> str:
        """As what the value of a setting was given, for error messages: a variable, that of a file, or a keyword."""
        return self._given_as.get(name, f"{PREFIX}{name.upper()}")

    @property
    def local(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        if self.host.lower() in _LOCAL_HOSTS:
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def check_entrance(self) -> Auth:
        """Who is let in. A server that others can reach needs that to be said.

        Raises:
            SettingsError: when it is not said, or settings that belong together are not together.
        """
        if (self.tls_key or self.tls_client_ca) and not self.tls_cert:
            raise SettingsError("TLS needs a certificate too", where=f"{PREFIX}TLS_CERT")
        if self.tenant_burst and not self.tenant_per_minute:
            raise SettingsError("a burst needs a number of requests per minute", where=f"{PREFIX}TENANT_PER_MINUTE")
        if self.auth is None and not self.local:
            raise SettingsError(
                f"others can reach {self.host}, so say who is let in: keys (make one with tidegate keys create), "
                "or none when something in front of the gateway checks who calls",
                where=f"{PREFIX}AUTH",
            )
        return self.auth or "none"

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
    values, given_as = _from_environment(os.environ if environment is None else environment)
    for name, value in given.items():
        if name not in Settings.model_fields:
            raise SettingsError(f"unknown setting{_nearest(name, Settings.model_fields)}", where=name)
        if value is not None:
            values[name], given_as[name] = value, name
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise _explain(error, values, given_as) from None
    settings._given_as.update(given_as)
    return settings


def log_format_asked(environment: Mapping[str, str] | None = None) -> LogFormat:
    """The form of the log, for whoever has to say that other settings cannot be used; ``text`` where it is none.

    Args:
        environment: the variables to read; None for those of this process.
    """
    asked = (os.environ if environment is None else environment).get(f"{PREFIX}LOG_FORMAT")
    return "json" if asked == "json" else "text"


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by the names of settings, and the variables that they are from."""
    known = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
    files = {f"{PREFIX}{name.upper()}_FILE": name for name in _IN_FILES}
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for variable in sorted(environment):
        if not variable.startswith(PREFIX):
            continue
        if variable in known:
            name = known[variable]
            values[name], given_as[name] = environment[variable], variable
        elif variable in files:
            name = files[variable]
            if f"{PREFIX}{name.upper()}" in environment:
                raise SettingsError("give the secret itself or its file, not both", where=variable)
            values[name], given_as[name] = _secret_from(environment[variable], variable), variable
        else:
            raise SettingsError(f"unknown setting{_nearest(variable, (*known, *files))}", where=variable)
    unset = [name for name, value in values.items() if value == "" and name in _UNSET_WHEN_EMPTY]
    for name in unset:
        del values[name], given_as[name]
    return values, given_as


def _secret_from(path: str, variable: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_LONGEST_SECRET_FILE).strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SettingsError(f"cannot read the file {path!r}: {reason}", where=variable) from None


def _explain(error: ValidationError, values: Mapping[str, Any], given_as: Mapping[str, str]) -> SettingsError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if name not in _HIDDEN:
        message = f"{message}, got {values[name]!r}"
    return SettingsError(message, where=given_as[name])


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    short = {candidate.removeprefix(PREFIX): candidate for candidate in known}
    close = difflib.get_close_matches(name.removeprefix(PREFIX), list(short), n=1, cutoff=0.6)
    return f", did you mean {short[close[0]]}?" if close else f"; known: {', '.join(sorted(known))}"
