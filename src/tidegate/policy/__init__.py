"""Verdict in, decision out: policies as data (YAML), and the pure functions that apply them.

How a policy chooses, in four steps:

1. Which categories are present? A category that has a threshold in the policy, and a probability from the guard, is
   present when the probability is at least the threshold. Any other category is present when the guard names it. The
   probability of a category is conditional: how likely it is that the text is of this category if it is not safe. How
   sure the guard is that it is not safe at all is the rules' business (``probability``). Jailbreak is about prompts
   only, and never present in a response.
2. For each present category the rules are tried in their order, and the first match wins. With no category present
   they are tried once, and only rules that name no category can match.
3. When no rule matches: with ``controversial: unsafe`` the rules are tried again as if what is controversial were
   unsafe; with ``controversial: review`` a verdict that is controversial or worse gets at least REVIEW; then comes
   ``otherwise``. So a rule that speaks of controversial text always goes before the general treatment.
4. Over the present categories the worst action wins, so a lenient rule for one category never hides another category
   in the same text. The advice of every rule that was chosen on the way is kept.

A rule matches when all that it names matches. ``severity`` means this one or a worse one, by the guard's own call.
``probability: {unsafe: p}`` asks beside that for a probability of unsafe of at least p, ``{flagged: p}`` for one of
controversial and unsafe together: with ``severity: unsafe`` a rule is milder than the guard, with ``severity: safe``
stricter. Where controversial is tried as unsafe (step 3), its probability counts as unsafe too.

Who wins. A policy has a default and may have layers: default < region < tenant < route. What a layer says lies above
what is below it; its rules are tried before those below, and it can leave rules of others out. `explain` shows it.

What is only observed (a rule, a layer, the whole policy) is decided like the rest and then not done: the decision says
what it would have been.

Pure: no clock, no network. Disk is read by `load_policy` and `WatchedPolicy` alone.
"""

from __future__ import annotations

from tidegate.policy.carrying import Confirm, Hold, InterventionWord, Rollback
from tidegate.policy.deciding import (
    DEFAULT_MESSAGE,
    RESERVED_NAMES,
    UNJUDGED_ANSWER,
    UNJUDGED_REQUEST,
    Policy,
    ScopedPolicy,
    decide,
    decide_token,
    observed,
)
from tidegate.policy.explaining import Explanation, explain
from tidegate.policy.reading import FIELDS, MAX_BYTES, PRESETS, load_policy, parse_policy
from tidegate.policy.replaying import Change, Replay
from tidegate.policy.rules import (
    FAILURE_KINDS,
    Controversial,
    Degraded,
    History,
    Layer,
    LayerKind,
    OnGuardError,
    Retention,
    Rule,
    UnjudgedAnswer,
    UnjudgedRequest,
)
from tidegate.policy.watching import PolicySource, WatchedPolicy, unconfirmed

__all__ = [
    "DEFAULT_MESSAGE",
    "FAILURE_KINDS",
    "FIELDS",
    "MAX_BYTES",
    "PRESETS",
    "RESERVED_NAMES",
    "UNJUDGED_ANSWER",
    "UNJUDGED_REQUEST",
    "Change",
    "Confirm",
    "Controversial",
    "Degraded",
    "Explanation",
    "History",
    "Hold",
    "InterventionWord",
    "Layer",
    "LayerKind",
    "OnGuardError",
    "Policy",
    "PolicySource",
    "Replay",
    "Retention",
    "Rollback",
    "Rule",
    "ScopedPolicy",
    "UnjudgedAnswer",
    "UnjudgedRequest",
    "WatchedPolicy",
    "decide",
    "decide_token",
    "explain",
    "load_policy",
    "observed",
    "parse_policy",
    "unconfirmed",
]
