"""A policy file that is looked at again and again: the policy in force is always a whole one that could be read."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, Protocol

from tidegate.errors import PolicyError
from tidegate.policy.deciding import Policy
from tidegate.policy.reading import load_policy, parse_policy_file, policy_path, read_policy_file

__all__ = ["PERIOD_S", "PolicySource", "WatchedPolicy", "unconfirmed"]

PERIOD_S: Final = 0.4
"""Seconds between two looks. A change is in force after two looks that find the same: in a second, in every process."""

Outcome = Literal["taken", "refused", "unreadable", "mended"]

_log = logging.getLogger("tidegate.policy")


def unconfirmed(policy: Policy) -> str | None:
    """Why a policy cannot be carried out where no guard confirms alarms; None when it can."""
    if not policy.confirms:
        return None
    return "confirm: no guard is there to confirm alarms: name one with TIDEGATE_CONFIRM_GUARD, or say confirm: false"


class PolicySource(Protocol):
    """Where the policy in force is: a `Policy`, which is always itself, or a `WatchedPolicy`."""

    @property
    def current(self) -> Policy:
        """The policy in force now. Whoever decides about several things of one exchange asks once."""
        ...


class WatchedPolicy:
    """A policy file whose changes come into force by themselves.

    The content counts, not the time of the file, so that it works on every file system and with files that are
    replaced by links. A content is taken when two looks in a row find it, so that a file that is being written is not
    taken in its middle. One that is not a policy, or cannot be read, changes nothing: the last good one stays in force,
    and ``problem`` says why.

    Args:
        path_or_preset: what `load_policy` takes. It must be good at the beginning.
        tell: called after every change of ``current`` and ``problem``, with what happened; None for nobody.

    Raises:
        PolicyError: as `load_policy`.

    Attributes:
        path: of the file.
        problem: why the file's content is not in force, with its place; None when it is.
    """

    def __init__(self, path_or_preset: str | Path, *, tell: Callable[[Outcome], None] | None = None) -> None:
        self.path = policy_path(path_or_preset)
        self.problem: str | None = None
        self.tell = tell
        self._current = load_policy(path_or_preset)
        self._why_not: Callable[[Policy], str | None] = lambda policy: None
        self._taken: str | None = None
        self._seen: str | None = None
        self._refused: str | None = None

    @property
    def current(self) -> Policy:
        """The policy in force: the last good one."""
        return self._current

    def require(self, why_not: Callable[[Policy], str | None]) -> None:
        """Ask this of every policy from now on: one that cannot be carried out here is refused, as a broken file is.

        Args:
            why_not: why a policy cannot be carried out, in words for whoever wrote the file; None when it can.

        Raises:
            PolicyError: when the one in force cannot.
        """
        self._why_not = why_not
        if (reason := why_not(self._current)) is not None:
            raise PolicyError(reason, where=str(self.path))

    def look(self) -> bool:
        """Look at the file once; whether another policy came into force. Reads the disk."""
        try:
            data = read_policy_file(self.path)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            return self._find(f"unreadable: {reason}", lambda: self._refuse(f"{self.path}: {reason}", "unreadable"))
        return self._find(hashlib.sha256(data).hexdigest(), lambda: self._take(data))

    async def watch(self, period_s: float = PERIOD_S) -> None:
        """Look every so many seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:  # whatever goes wrong with one look, the next one comes
                _log.error("the policy file could not be looked at: %s", type(error).__name__)

    def _find(self, content: str, change: Callable[[], bool]) -> bool:
        settled, self._seen = content == self._seen, content
        if content == self._taken:
            self._clear()
            return False
        if not settled or content == self._refused:
            return False
        return change()

    def _take(self, data: bytes) -> bool:
        try:
            policy = parse_policy_file(data, source=str(self.path))
        except PolicyError as error:
            return self._refuse(str(error), "refused")
        if (reason := self._why_not(policy)) is not None:
            return self._refuse(f"{self.path}: {reason}", "refused")
        self._taken = self._seen
        self._clear()
        if policy == self._current:
            return False
        self._current = policy
        _log.info("policy %s %s is in force", policy.name, policy.version)
        self._say("taken")
        return True

    def _refuse(self, problem: str, outcome: Outcome) -> bool:
        self._refused, self.problem = self._seen, problem
        _log.error("%s %s stays in force: %s", self._current.name, self._current.version, problem)
        self._say(outcome)
        return False

    def _clear(self) -> None:
        """What the file says is in force."""
        self._refused = None
        if self.problem is not None:
            self.problem = None
            self._say("mended")

    def _say(self, outcome: Outcome) -> None:
        if self.tell is not None:
            self.tell(outcome)
