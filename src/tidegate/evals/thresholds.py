"""Find the two thresholds of a cascade on data that both guards have judged, and say what they cost.

Agreement is with the second guard, not with labels: the share of rows on which the cascade's call is the second
guard's. Rows that the second guard is asked about agree by that. With ``bar`` CONTROVERSIAL two calls are the same when
both are safe or both are not; with UNSAFE, when both are unsafe or both are not.

Figures of the rows on which thresholds were found are too good: measure them on other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidegate.errors import InputError
from tidegate.evals.run import Judged
from tidegate.guards.cascade import AskBetween, AskOptions
from tidegate.types import Severity, Target, Verdict

__all__ = ["CascadeFigures", "find_options", "find_thresholds", "measure_cascade"]

Pair = tuple[Verdict, Verdict]
"""What the first and the second guard said of one text."""


@dataclass(frozen=True, slots=True)
class CascadeFigures:
    """What a cascade does on rows that both guards judged.

    Attributes:
        rows: how many there are.
        not_judged: rows that are left out because one of the guards failed.
        asked: share of rows that the second guard is asked about, in [0, 1]; the cost.
        agreement: share of rows on which the cascade says what the second guard says, in [0, 1].
        first_agreement: the same for the first guard alone.
        missed: share of rows that the second guard flags and the cascade does not, in [0, 1].
        false_alarms: share of rows that the cascade flags and the second guard does not, in [0, 1].
    """

    rows: int
    not_judged: int
    asked: float
    agreement: float
    first_agreement: float
    missed: float
    false_alarms: float


def find_options(
    first: Sequence[Judged],
    second: Sequence[Judged],
    *,
    agreement: float | None = None,
    most_asked: float | None = None,
    bar: Severity = Severity.CONTROVERSIAL,
) -> AskOptions:
    """Thresholds for prompts and for responses, each found as `find_thresholds` does on the rows of its own kind.

    Args:
        first: what the first guard said of some examples.
        second: what the second guard said of the same, in the same order. Rows where one failed do not count.
        agreement: see `find_thresholds`.
        most_asked: see `find_thresholds`.
        bar: from which severity on a row is flagged.

    Raises:
        InputError: when the rows are not of the same examples, a target has no rows, or what is asked for cannot be
            had; says for which target.
    """
    pairs, _ = _pairs(first, second)
    found: dict[Target, AskBetween] = {}
    for target in Target:
        rows = [pair for pair in pairs if pair[0].target is target]
        try:
            found[target] = find_thresholds(rows, agreement=agreement, most_asked=most_asked, bar=bar)
        except InputError as error:
            raise InputError(f"{target.value} rows: {error.message}", where=error.where) from None
    return AskOptions(prompt=found[Target.PROMPT], response=found[Target.RESPONSE])


def find_thresholds(
    pairs: Sequence[Pair],
    *,
    agreement: float | None = None,
    most_asked: float | None = None,
    bar: Severity = Severity.CONTROVERSIAL,
) -> AskBetween:
    """The thresholds that ask least for a stated agreement, or agree most for a stated cost. Exact: no grid.

    Args:
        pairs: verdicts of both guards on the same texts, all of one target.
        agreement: the least share of rows on which the cascade must say what the second guard says, in (0, 1]; None
            for the best that ``most_asked`` allows.
        most_asked: the greatest share of rows that the second guard may be asked about, in [0, 1]; None for any.
        bar: from which severity on a row is flagged.

    Raises:
        InputError: when both are None or out of range, there are no rows, or the agreement costs more than may be
            asked; then says what it costs, and what can be had for the cost.
    """
    _check(pairs, agreement, most_asked)
    spread = _spread(pairs, bar)
    limit = len(pairs) if most_asked is None else int(most_asked * len(pairs) + 1e-9)
    if agreement is None:
        return spread.between(*spread.most_agreeing(limit))
    allowed = int((1.0 - agreement) * len(pairs) + 1e-9)
    start, stop = spread.cheapest(allowed)
    asked = spread.rows(start, stop)
    if asked > limit:
        best = spread.most_agreeing(limit)
        reached = 1.0 - spread.left_out(*best) / len(pairs)
        raise InputError(
            f"an agreement of {agreement:.4g} asks about {asked / len(pairs):.1%} of the rows; "
            f"with at most {most_asked:.1%} it is {reached:.4f}",
            where="most_asked",
        )
    return spread.between(start, stop)


def measure_cascade(
    first: Sequence[Judged],
    second: Sequence[Judged],
    options: AskOptions,
    *,
    bar: Severity = Severity.CONTROVERSIAL,
) -> CascadeFigures:
    """What a cascade with these options would have said, and asked, on rows that both guards judged.

    Raises:
        InputError: when the rows are not of the same examples, or none was judged by both.
    """
    pairs, left_out = _pairs(first, second)
    if not pairs:
        raise InputError("no row was judged by both guards", where="rows")
    asked = np.asarray([options.wanted(one) for one, _ in pairs])
    cheap = np.asarray([one.severity >= bar for one, _ in pairs])
    strong = np.asarray([two.severity >= bar for _, two in pairs])
    called = np.where(asked, strong, cheap)
    return CascadeFigures(
        rows=len(pairs),
        not_judged=left_out,
        asked=float(asked.mean()),
        agreement=float((called == strong).mean()),
        first_agreement=float((cheap == strong).mean()),
        missed=float((strong & ~called).mean()),
        false_alarms=float((called & ~strong).mean()),
    )


@dataclass(frozen=True, slots=True)
class _Spread:
    """Rows by the first guard's probability of not being safe, rows of one probability together.

    Attributes:
        values: ``[groups]``, ascending, each probability once.
        row_sums: ``[groups + 1]``, how many rows the groups before have.
        error_sums: ``[groups + 1]``, on how many of these the guards disagree.
    """

    values: npt.NDArray[np.float64]
    row_sums: npt.NDArray[np.int64]
    error_sums: npt.NDArray[np.int64]

    def rows(self, start: int, stop: int) -> int:
        """How many rows the groups ``[start, stop)`` have."""
        return int(self.row_sums[stop] - self.row_sums[start])

    def left_out(self, start: int, stop: int) -> int:
        """On how many rows outside of the groups ``[start, stop)`` the guards disagree."""
        return int(self.error_sums[-1] - self.error_sums[stop] + self.error_sums[start])

    def cheapest(self, allowed: int) -> tuple[int, int]:
        """The groups with the fewest rows that leave out at most so many disagreements."""
        groups, stop = len(self.values), 0
        best = (0, groups)
        for start in range(groups + 1):
            stop = max(start, stop)
            while stop < groups and self.left_out(start, stop) > allowed:
                stop += 1
            if self.left_out(start, stop) > allowed:
                break
            if self.rows(start, stop) < self.rows(*best):
                best = (start, stop)
        return best

    def most_agreeing(self, limit: int) -> tuple[int, int]:
        """The groups of at most so many rows that leave out the fewest disagreements; of several, the fewest rows."""
        start, least = 0, self.left_out(0, 0)
        for stop in range(len(self.values) + 1):
            while self.rows(start, stop) > limit:
                start += 1
            least = min(least, self.left_out(start, stop))
        return self.cheapest(least)

    def between(self, start: int, stop: int) -> AskBetween:
        """Thresholds around the groups ``[start, stop)``, in the middle between two groups where there is one."""
        if start == stop:
            return self._nowhere()
        low = self._middle(start - 1, start, self.values[start]) if start else 0.0
        high = self._middle(stop - 1, stop, self.values[stop - 1]) if stop < len(self.values) else 1.0
        return AskBetween(low=low, high=high)

    def _middle(self, before: int, behind: int, inside: float) -> float:
        middle = float((self.values[before] + self.values[behind]) / 2)
        return middle if self.values[before] < middle < self.values[behind] else float(inside)

    def _nowhere(self) -> AskBetween:
        """Thresholds between which no row lies: in the middle of the widest gap, where the fewest will."""
        edges = np.concatenate([[0.0], self.values, [1.0]])
        at = int(np.argmax(np.diff(edges)))
        middle = float((edges[at] + edges[at + 1]) / 2)
        return AskBetween(low=middle, high=middle)


def _spread(pairs: Sequence[Pair], bar: Severity) -> _Spread:
    flagged = np.asarray([one.probabilities.flagged for one, _ in pairs], np.float64)
    wrong = np.asarray([(one.severity >= bar) != (two.severity >= bar) for one, two in pairs], np.int64)
    values, group, counts = np.unique(flagged, return_inverse=True, return_counts=True)
    errors = np.bincount(group.reshape(-1), weights=wrong, minlength=len(values)).astype(np.int64)
    return _Spread(values, np.concatenate([[0], np.cumsum(counts)]), np.concatenate([[0], np.cumsum(errors)]))


def _pairs(first: Sequence[Judged], second: Sequence[Judged]) -> tuple[list[Pair], int]:
    """The rows that both guards judged, and how many there are besides."""
    if [row.example.id for row in first] != [row.example.id for row in second]:
        raise InputError("both guards must have judged the same examples in the same order", where="rows")
    pairs = [
        (one.verdict, two.verdict)
        for one, two in zip(first, second, strict=True)
        if one.verdict is not None and two.verdict is not None
    ]
    return pairs, len(first) - len(pairs)


def _check(pairs: Sequence[Pair], agreement: float | None, most_asked: float | None) -> None:
    if agreement is None and most_asked is None:
        raise InputError("expected an agreement, a cost, or both", where="agreement")
    if agreement is not None and not 0 < agreement <= 1:
        raise InputError(f"expected a share greater than 0 and at most 1, got {agreement}", where="agreement")
    if most_asked is not None and not 0 <= most_asked <= 1:
        raise InputError(f"expected a share from 0 to 1, got {most_asked}", where="most_asked")
    if not pairs:
        raise InputError("there are no rows that both guards judged", where="rows")
