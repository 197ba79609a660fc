"""The whole system on one page: judge, decide, keep.

`moderate` does it for a whole text, `StreamModerator` for a text that is still being written: it takes the text in
pieces and says of each character when it may leave. `moderate_stream` wraps it around an async iterator, `check` is
the one door for scripts and notebooks that are not async.

How a stream is decided. Each token is what the policy says of it alone. Its *debounced* action is the mildest of the
last ``policy.debounce`` tokens, so a single flagged token stops nothing; a text with fewer tokens than that is decided
by all that it has. The worst debounced action is the decision, with the verdict at the token that confirmed it. BLOCK
ends the stream. A character is released when every token that covers it has been judged, and it is not part of a run of
tokens that call for BLOCK and may still be confirmed; when such a run ends unconfirmed, it is released. A policy can
hold more (while the risk is high), or let text leave first, and bounds both: see `tidegate.policy.Hold`.

REDACT. Where all tokens of a confirmed run are about personal data, and the policy says redact, what
`tidegate.personal` finds is masked from there on, and the stream goes on. A find that reaches behind the last token
that called for nothing belongs to the run, also when it began before: so what was found is held until such a token has
followed. When nothing is found up to 200 characters behind the run's confirmation, there is nothing to take out, and
REDACT is BLOCK, as it is for every other category.

Before BLOCK stops anything, the policy can have the alarm confirmed by a second guard, which is asked about the text up
to the token at which the alarm stands; and it can have the text rolled back to what has left, and written anew from
there by whoever asks the upstream (`Retry`).

A guard may end with a token without width, its verdict about the complete text. It confirms or clears what is pending
before it: the two together are decided as the milder of them.

A guard that fails is decided by ``policy.on_guard_error``. When that is milder than BLOCK, what is held and all that
follows is let through, and the coverage says how many characters were not judged.

What a policy only observes is decided beside, with a debounce of its own, and stops nothing: the decision says what it
would have been, as far as the stream went. A policy has layers; here always those of the scope are meant.
"""

from __future__ import annotations

from tidegate.moderate.checking import check
from tidegate.moderate.stream import Again, Masked, Retry, Step, StreamModerator, ending_of, moderate_stream
from tidegate.moderate.whole import Keep, coverage_of, failure_of, moderate, surely

__all__ = [
    "Again",
    "Keep",
    "Masked",
    "Retry",
    "Step",
    "StreamModerator",
    "check",
    "coverage_of",
    "ending_of",
    "failure_of",
    "moderate",
    "moderate_stream",
    "surely",
]
