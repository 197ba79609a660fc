"""On which terms a guard judges for one scope: what a policy says of the guard itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from tidegate.guards.base import Guard

__all__ = ["GuardOnTerms", "Terms", "on_terms"]

G = TypeVar("G", bound=Guard)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a policy says of the guard.

    Attributes:
        deadline_s: seconds that it may take for a text or a piece of one, more than 0; None for as long as it may
            without the policy.
        degraded: whether the edge guard judges alone where the guard cannot.
        instructions: told to a generative guard beside its own policy; "" for none.
    """

    deadline_s: float | None = None
    degraded: bool = False
    instructions: str = ""


NO_TERMS = Terms()


@runtime_checkable
class GuardOnTerms(Protocol):
    """A guard that heeds terms, or some of them."""

    def on_terms(self, terms: Terms) -> Guard:
        """The same guard on these terms. Costs nothing; closing one closes all."""
        ...


def on_terms(guard: G, terms: Terms) -> G:
    """The guard on these terms: as far as it heeds them; one that heeds none is given back as it is."""
    if terms == NO_TERMS or not isinstance(guard, GuardOnTerms):
        return guard
    termed: G = guard.on_terms(terms)
    return termed
