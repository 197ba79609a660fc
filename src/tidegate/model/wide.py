"""The wide part of an edge guard: what n-grams tell, added up token by token.

A small model that reads each text a few times learns late what single spellings mean; a table of n-grams knows it at
once but understands nothing of order. The edge guard has both and adds them up (wide and deep learning, Cheng et al.
2016; hashed n-grams after Joulin et al. 2016 and Weinberger et al. 2009). The n-grams are those of tokens (1 to 3) and
of folded characters (2 to 5). Each is hashed into one row of a table of 8-bit numbers, and belongs to the token with
which it is complete; the sum over the tokens so far, divided by the root of how many n-grams there were, is added to
the risk logits. All sums are whole numbers: a verdict cannot depend on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tidegate.types import Target

__all__ = ["COLUMNS", "LEFT", "NgramHasher", "WideTable", "table_shift"]

COLUMNS = 2
"""What a row says: for Unsafe and for Controversial, against Safe."""
_BRANCHES = (Target.PROMPT, Target.RESPONSE)

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_TOKEN_ORDERS = (1, 2, 3)
_CHARACTER_ORDERS = (2, 3, 4, 5)
LEFT = max(*_TOKEN_ORDERS, *_CHARACTER_ORDERS) - 1
"""How many tokens before a token can be part of an n-gram with it: a token is one character at least."""
_BYTES = 0x110000
"""Where codes of single bytes begin, which are part of no whole character: behind the last code point."""
_FACTOR, _SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_MULTIPLIER, _MIXER = np.uint64(_FACTOR), np.uint64(_SECOND_FACTOR)
_64_BITS = (1 << 64) - 1
_POWERS = [pow(_FACTOR, n, 1 << 64) for n in range(LEFT + 1)]


class NgramHasher:
    """Hashes the n-grams of token sequences of one vocabulary.

    Args:
        texts: for each token id the bytes that it stands for; b"" for control tokens.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        codes = [_codes(text) for text in texts]
        self._lengths = np.asarray([len(code) for code in codes], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])
        self._codes = np.concatenate(codes) if codes else np.zeros(0, np.uint64)
        self._code_lists = [code.tolist() for code in codes]

    def rows_of_one(self, token: int, before: Sequence[int], shift: int) -> list[int]:
        """The upper bits of the hashes of the n-grams that are complete with one token, in plain Python.

        The same as `hashes` gives, less ``shift`` bits, in no order; for one token several times as fast.
        """
        left = list(before[-LEFT:])
        found = []
        rolling, ids = token + 1, [*left, token]
        for order in _TOKEN_ORDERS:
            if order > len(ids):
                break
            if order > 1:
                rolling += (ids[-order] + 1) * _POWERS[order - 1]
            found.append(rolling + order)
        own = self._code_lists[token]
        codes = [code for one in left for code in self._code_lists[one]][-LEFT:]
        skip = len(codes)
        codes += own
        for at in range(skip, len(codes)):
            rolling = codes[at]
            for order in _CHARACTER_ORDERS:
                if order > at + 1:
                    break
                rolling += codes[at + 1 - order] * _POWERS[order - 1]
                found.append(rolling + 8 + order)
        return [_mixed_one(value) >> shift for value in found]

    def hashes(self, ids: Sequence[int] | Ints, before: Sequence[int] | Ints = ()) -> tuple[Hashes, Ints]:
        """The n-grams that are complete with each of the tokens ``ids``, which follow the tokens ``before``.

        Returns:
            Hashes, and for each the index into ``ids`` of its token.
        """
        left = np.asarray(before[-LEFT:] if len(before) else (), np.int64)
        every = np.concatenate([left, np.asarray(ids, np.int64)])
        skip = len(left)
        places = np.arange(len(every), dtype=np.int64)
        found: list[tuple[Hashes, Ints]] = []
        rolling = every.astype(np.uint64) + np.uint64(1)
        for order in _TOKEN_ORDERS:
            if order > 1:
                rolling = rolling[:-1] * _MULTIPLIER + every[order - 1 :].astype(np.uint64) + np.uint64(1)
            found.append((_mixed(rolling, order), places[order - 1 :]))
        lengths = self._lengths[every]
        owners = np.repeat(places, lengths)
        inside = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        codes = self._codes[np.repeat(self._starts[every], lengths) + inside]
        rolling = codes
        for order in _CHARACTER_ORDERS:
            rolling = rolling[:-1] * _MULTIPLIER + codes[order - 1 :]
            found.append((_mixed(rolling, 8 + order), owners[order - 1 :]))
        hashes = np.concatenate([part for part, _ in found])
        owner = np.concatenate([part for _, part in found])
        new = owner >= skip
        return hashes[new], owner[new] - skip


class WideTable:
    """Hashed n-grams of token sequences, and what a table says of them for prompts and for responses.

    Args:
        hasher: of the tokenizer's vocabulary.
        values: int8 ``[2, rows, COLUMNS]``: of prompts, then of responses; rows is a power of two.

    Raises:
        ValueError: when the table has another shape or type.
    """

    def __init__(self, hasher: NgramHasher, values: NDArray[np.int8]) -> None:
        if values.ndim != 3 or values.shape[::2] != (len(_BRANCHES), COLUMNS) or values.dtype != np.int8:
            raise ValueError(f"expected int8 [{len(_BRANCHES)}, rows, {COLUMNS}], not {values.dtype} {values.shape}")
        if values.shape[1] < 2 or values.shape[1] & (values.shape[1] - 1):
            raise ValueError(f"expected a power of two of rows, not {values.shape[1]}")
        self._hasher = hasher
        self._values = dict(zip(_BRANCHES, np.asarray(values), strict=True))
        self._shift = table_shift(values.shape[1])

    @classmethod
    def load(cls, path: Path, hasher: NgramHasher) -> WideTable:
        """Read a ``.npy`` file. Raises OSError or ValueError when it is not such a table."""
        return cls(hasher, np.load(path, mmap_mode="r", allow_pickle=False))

    def evidence(self, target: Target, ids: Sequence[int], before: Sequence[int] = ()) -> Ints:
        """What n-grams say at each of the tokens ``ids``, which follow the tokens ``before`` in the same text.

        Returns:
            int64 ``[tokens, COLUMNS + 1]``: the sums of the n-grams that are complete with the token, and their number.
        """
        if len(ids) == 1:
            rows_of_one = self._hasher.rows_of_one(ids[0], before, int(self._shift))
            said = self._values[target][rows_of_one].sum(axis=0, dtype=np.int64)
            return np.array([[*said.tolist(), len(rows_of_one)]], np.int64)
        hashes, owner = self._hasher.hashes(ids, before)
        rows = self._values[target][(hashes >> self._shift).astype(np.int64)]
        result = np.empty((len(ids), COLUMNS + 1), np.int64)
        for column in range(COLUMNS):
            result[:, column] = np.bincount(owner, rows[:, column], len(ids))
        result[:, COLUMNS] = np.bincount(owner, minlength=len(ids))
        return result


def table_shift(rows: int) -> np.uint64:
    """How far a hash is shifted to become an index into a table of a power of two of rows."""
    return np.uint64(64 - (rows.bit_length() - 1))


def _codes(text: bytes) -> Hashes:
    try:
        return np.asarray([ord(character) + 1 for character in text.decode()], np.uint64)
    except UnicodeDecodeError:
        return np.asarray([_BYTES + byte + 1 for byte in text], np.uint64)


def _mixed(rolling: Hashes, kind: int) -> Hashes:
    """Well-spread hashes: a table of any size takes the upper bits."""
    mixed = (rolling + np.uint64(kind)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(32))) * _MIXER
    return mixed ^ (mixed >> np.uint64(29))


def _mixed_one(value: int) -> int:
    """The same of one number to which its kind was added already."""
    mixed = value * _FACTOR & _64_BITS
    mixed = (mixed ^ (mixed >> 32)) * _SECOND_FACTOR & _64_BITS
    return mixed ^ (mixed >> 29)
