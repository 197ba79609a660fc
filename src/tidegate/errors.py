"""Every exception that Tidegate raises on purpose, so that a caller can catch exactly what it can mend.

TidegateError
├── InputError              what the caller gave is wrong: says what, what was expected, and where
│   ├── SettingsError       a setting (environment variable, option) is unknown or malformed
│   ├── PolicyError         a policy file cannot be used: carries the place in the file
│   └── RecipeError         a training recipe cannot be used
├── GuardError              a guard could not judge: the third outcome, neither safe nor unsafe
│   ├── GuardUnavailable    the guard cannot be loaded or reached
│   ├── GuardOverloaded     the guard refuses more work for now
│   ├── GuardTimeout        the guard did not answer in time
│   ├── SessionClosed       a session was used after its end
│   └── UnreadableVerdict   the guard answered, but not in a form that can be read
├── UpstreamError           the LLM behind the gateway failed: unreachable, broke off, or answered malformed data
└── StoreError              a decision could not be kept
"""

from __future__ import annotations

__all__ = [
    "GuardError",
    "GuardOverloaded",
    "GuardTimeout",
    "GuardUnavailable",
    "InputError",
    "PolicyError",
    "RecipeError",
    "SessionClosed",
    "SettingsError",
    "StoreError",
    "TidegateError",
    "UnreadableVerdict",
    "UpstreamError",
]


class TidegateError(Exception):
    """The root: anything that Tidegate raises on purpose."""


class InputError(TidegateError):
    """What the caller gave is wrong.

    Args:
        message: what was wrong and what was expected, without any user text.
        where: the place, as a path into the input (``messages[2].role``) or ``file:line``; None when it is the whole.
    """

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.where = where


class SettingsError(InputError):
    """A setting is unknown or malformed."""


class PolicyError(InputError):
    """A policy file cannot be used."""


class RecipeError(InputError):
    """A training recipe cannot be used."""


class GuardError(TidegateError):
    """A guard could not judge. Neither safe nor unsafe: the policy's ``on_guard_error`` says what it means."""


class GuardUnavailable(GuardError):
    """The guard cannot be loaded or reached."""


class GuardOverloaded(GuardError):
    """The guard refuses more work for now."""


class GuardTimeout(GuardError):
    """The guard did not answer in time."""


class SessionClosed(GuardError):
    """A session was used after ``finish`` or ``close``."""


class UnreadableVerdict(GuardError):
    """The guard answered, but not in a form that can be read."""


class UpstreamError(TidegateError):
    """The LLM behind the gateway failed.

    Args:
        message: what happened, without any user text.
        status: the HTTP status that the upstream gave; None when there was none.
        reason: more for the operator's log, in words of ours or of the system, as ``connection refused``; no client is
            told. None when the message says all.
    """

    def __init__(self, message: str, *, status: int | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class StoreError(TidegateError):
    """A decision could not be kept."""
