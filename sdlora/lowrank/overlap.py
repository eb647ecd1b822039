"""How two changes of one weight meet: their cosine, and how far they write to and read from the same directions.

A change D (out, in) writes to its column space and reads from its row space. Everything is computed from the factors,
by matrices of (rank, rank); the product of low-rank factors is never formed.

The overlap of two column spaces goes by energy, not by rank. C = D D^T tells how much energy D gives to each direction;
less the mean over all directions, it tells which ones D prefers:

    C' = C - tr(C) / out * I        overlap = <C1', C2'> / (|C1'| |C2'|)

This is the RV coefficient (Robert and Escoufier 1976) with chance taken off. 1 is the same directions in the same
proportions; 0 is what unrelated changes have, whatever their ranks and the width of the layer; below 0 they keep apart.
<C1, C2> = sum over i, j of s1_i^2 s2_j^2 cos^2(u1_i, u2_j) counts each direction by its energy, so that noise counts
for nothing. Of changes with r1 and r2 equal singular values it is the sum of the squared cosines of the principal
angles (Bjorck and Golub 1973), and overlap = (sum cos^2 - r1 r2 / out) / sqrt(r1 (1 - r1 / out) r2 (1 - r2 / out)).
Row spaces alike, with D^T D.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod, sqrt

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.effect import factor_pair, linear_change
from sdlora.lowrank.laws import Delta, Hadamard, Kronecker, LowRank
from sdlora.lowrank.truncation import Keep, as_low_rank

ENERGY = 0.99  # the strongest directions that together hold this share of a change's energy are those that it has
PLAIN = 1e-6  # a change whose |C'|^2 is less than this share of |C|^2 prefers no direction


@dataclass(frozen=True, eq=False)
class Change:
    """A change as scale * left (out, n) @ right (n, in * kh * kw), where None is the identity.

    shape: (out, in * kh * kw), or (width,) of a bias or a norm, whose left is (width, 1).
    """

    left: Tensor | None
    right: Tensor | None
    shape: tuple[int, ...]
    scale: float = 1.0

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return abs(self.scale) * self._norm

    @cached_property
    def _norm(self) -> float:
        return sqrt(max(_inner(self._left_gram, self._right_gram), 0.0))

    @cached_property
    def _left_gram(self) -> Tensor | None:
        return _product(_turned(self.left), self.left)

    @cached_property
    def _right_gram(self) -> Tensor | None:
        return _product(self.right, _turned(self.right))

    @cached_property
    def _fourth(self) -> float:
        """|C|^2 at scale 1: the sum of the fourth powers of the singular values."""
        return _twice(self._right_gram, self._left_gram, self._right_gram)

    def _preference(self, width: int) -> float:
        """|C'| at scale 1 among this many directions."""
        own = self._fourth - self._norm**4 / width
        return sqrt(own) if own > PLAIN * self._fourth else 0.0


@dataclass(frozen=True)
class Overlap:
    """How two changes meet.

    inner: their inner product; cosine: that over both norms, -1 to 1, and 0 where one of them is nothing. columns,
    rows: overlap of the column and the row spaces, -1 to 1 (see the head of this file), 0 where a change prefers none
    of its directions; None for vectors, which have no such spaces.
    """

    inner: float
    cosine: float
    columns: float | None
    rows: float | None


def change_of(delta: Delta, base: Tensor | None = None) -> Change:
    """Any delta as a change that can be compared: LoRA, and LoHa and LoKr of little rank, by their factors.

    base: the untouched weight, for laws that depend on it. SdloraError: it is needed and not given, or does not fit.
    """
    if isinstance(delta, LowRank):
        return _by_factors(delta)
    if not delta.linear and base is None:
        raise SdloraError(f"{delta.name} depends on the weights of the base model")
    rank = _rank_at_most(delta)
    if rank is not None and 2 * rank <= min(delta.shape[0], prod(delta.shape[1:])):
        return _by_factors(as_low_rank(delta, delta.shape, Keep())[0])
    whole = linear_change(delta) if base is None or delta.linear else delta.weight(base)
    if whole.dim() < 2:
        return Change(whole[:, None], None, tuple(whole.shape))
    matrix = whole.flatten(1)
    out, into = matrix.shape
    return Change(matrix, None, (out, into)) if out >= into else Change(None, matrix, (out, into))


def overlap(one: Change, other: Change) -> Overlap:
    """How two changes of the same parameter meet."""
    left = _product(_turned(one.left), other.left)
    right = _product(one.right, _turned(other.right))
    inner, norms = one.scale * other.scale * _inner(left, right), one.norm * other.norm
    cosine = _bounded(inner / norms) if norms else 0.0
    if len(one.shape) < 2:
        return Overlap(inner, cosine, None, None)
    columns = _twice(one._right_gram, left, other._right_gram)
    rows = _twice(one._left_gram, right, other._left_gram)
    out, into = one.shape
    return Overlap(inner, cosine, _correlation(one, other, columns, out), _correlation(one, other, rows, into))


def principal_cosines(one: Change, other: Change) -> tuple[Tensor, Tensor]:
    """Cosines of the principal angles between two column spaces, and between the row spaces, largest first.

    They are the singular values of Q1^T Q2 for orthonormal bases Q1 and Q2 (Bjorck and Golub 1973). Of each change the
    directions count that together hold ENERGY of its energy. For matrices, not for vectors.
    """
    (columns_1, rows_1), (columns_2, rows_2) = _directions(one), _directions(other)
    columns, rows = torch.linalg.svdvals(columns_1.T @ columns_2), torch.linalg.svdvals(rows_1 @ rows_2.T)
    return columns.clamp(max=1), rows.clamp(max=1)


def _directions(change: Change) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (out, n) and rows (n, in * kh * kw): the singular vectors that carry the energy."""
    left = None if change.left is None else torch.linalg.qr(change.left.double())
    right = None if change.right is None else torch.linalg.qr(change.right.double().T)
    core = _product(left and left.R, _turned(right and right.R))
    assert core is not None
    columns, values, rows = torch.linalg.svd(core, full_matrices=False)
    energy = values.square().cumsum(0)
    count = int((energy < ENERGY * energy[-1]).sum()) + 1
    columns, rows = columns[:, :count], rows[:count]
    return columns if left is None else left.Q @ columns, rows if right is None else rows @ right.Q.T


def _by_factors(delta: LowRank) -> Change:
    """Products of 16 bits are exact in float32; those of factors with more are made in float64."""
    if delta.mid is not None:
        up, down = factor_pair(delta)
        return Change(up, down, (up.shape[0], down.shape[1]))
    narrow = max(delta.up.dtype.itemsize, delta.down.dtype.itemsize) <= 2
    dtype = torch.float32 if narrow else torch.float64
    up, down = (factor.detach().to(dtype).flatten(1) for factor in (delta.up, delta.down))
    return Change(up, down, (up.shape[0], down.shape[1]), delta.scale)


def _rank_at_most(delta: Delta) -> int | None:
    """The largest rank that the factors of LoHa and LoKr can make; None for other laws, and for LoHa round a core."""
    if isinstance(delta, Hadamard) and delta.t1 is None:
        return delta.w1_b.shape[0] * delta.w2_b.shape[0]
    if isinstance(delta, Kronecker):
        whole = (delta.w1 if delta.w1_b is None else delta.w1_b, delta.w2 if delta.w2_b is None else delta.w2_b)
        return prod(min(one.shape[0], prod(one.shape[1:])) for one in whole if one is not None)
    return None


def _correlation(one: Change, other: Change, shared: float, width: int) -> float:
    """<C1', C2'> / (|C1'| |C2'|) among this many directions; shared: <C1, C2> at scale 1."""
    both = one._preference(width) * other._preference(width)
    return _bounded((shared - (one._norm * other._norm) ** 2 / width) / both) if both else 0.0


def _bounded(cosine: float) -> float:
    return min(max(cosine, -1.0), 1.0)


def _turned(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.T


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a @ b, where None is the identity: summed in float32 where one of them is, else in float64."""
    if a is None or b is None:
        one = b if a is None else a
        return None if one is None else one.double()
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return (a @ b).double()


def _inner(a: Tensor | None, b: Tensor | None) -> float:
    """tr(a^T b) of two matrices of one shape, where None is the identity."""
    if a is None or b is None:
        one = b if a is None else a
        assert one is not None
        return float(one.diagonal().sum())
    return float((a * b).sum())


def _twice(a: Tensor | None, between: Tensor | None, b: Tensor | None) -> float:
    """tr(a X b X^T) of symmetric a and b with X between them; None is the identity."""
    return _inner(_product(a, between), _product(between, b))
