"""Fewer ranks: the singular values of a change, which of them to keep, and the low-rank delta that holds those.

By the theorem of Eckart, Young and Mirsky the largest singular values with their vectors are the nearest low-rank
matrix in the Frobenius norm. Everything is computed in float64 and rounded once. Where a change is given by factors,
its singular values come from the factors and the full matrix is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, prod

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.effect import factor_pair, kronecker_factors, linear_change
from sdlora.lowrank.laws import Delta, Hadamard, Kronecker, LowRank
from sdlora.lowrank.laws.delta import Shape, check_fit

# float32 factors cannot hold less than this beside the largest singular value.
NOISE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Keep:
    """Which singular values s[0] >= s[1] >= ... of each module to keep: `rank` of them, or by one of three rules.

    rank: so many; beside a rule, at most so many. Without any field all are kept that are more than noise.
    ratio: those with s > s[0] / ratio (sv_ratio of kohya's sd-scripts).
    frobenius: the fewest that hold this share of the Frobenius norm: sum of kept s^2 >= share^2 * sum of s^2 (sv_fro).
    cumulative: the fewest that hold this share of the sum of singular values (sv_cumulative).
    At least one is kept, and none that is noise. SdloraError: a field is out of range, or two rules are given.
    """

    rank: int | None = None
    ratio: float | None = None
    frobenius: float | None = None
    cumulative: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise SdloraError(f"rank {self.rank!r} is no rank to keep; give a whole number of at least 1")
        if self.ratio is not None and not (_number(self.ratio) and self.ratio >= 1):
            raise SdloraError(f"ratio {self.ratio!r} is out of range; give a number of at least 1, such as 20")
        for name, share in (("frobenius", self.frobenius), ("cumulative", self.cumulative)):
            if share is not None and not (_number(share) and 0 < share <= 1):
                raise SdloraError(f"{name} {share!r} is out of range; give a share above 0, at most 1, such as 0.95")
        if len(self.rules) > 1:
            raise SdloraError(f"{' and '.join(self.rules)} are given together; give one, with or without a rank")

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the rules given, rank left out."""
        return tuple(name for name in ("ratio", "frobenius", "cumulative") if getattr(self, name) is not None)

    def keeps_all(self, rank: int) -> bool:
        """Whether a delta of this rank loses nothing, whatever its singular values are."""
        return not self.rules and (self.rank is None or self.rank >= rank)

    def count(self, values: Tensor) -> int:
        """How many of the singular values (n,), largest first, to keep."""
        largest = float(values[0])
        if largest == 0:
            return 1
        counts = [int((values > NOISE * largest).sum())]
        if self.rank is not None:
            counts.append(self.rank)
        if self.ratio is not None:
            counts.append(int((values > largest / self.ratio).sum()))
        if self.frobenius is not None:
            counts.append(_reaching(values.square(), self.frobenius**2))
        if self.cumulative is not None:
            counts.append(_reaching(values, self.cumulative))
        return max(min(counts), 1)


@dataclass(frozen=True)
class Kept:
    """What a module kept.

    rank_before: the inner size of the law, None for laws and changes that have none. energy: the share of the squared
    Frobenius norm that the kept singular values hold, 0 to 1. error: |kept - change| / |change| in the Frobenius norm,
    clamping included.
    """

    rank_before: int | None
    rank: int
    energy: float
    error: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one parameter: its path, its new delta, and what that kept; kept is None for what has no ranks."""

    path: str
    delta: Delta
    kept: Kept | None


def decompose(
    change: Tensor, keep: Keep, clamp: float | None = None, dtype: torch.dtype | None = None
) -> tuple[LowRank, Kept]:
    """The nearest low-rank delta to a change of a weight (out, in[, kh, kw]), its alpha being its rank (scale 1).

    The square roots of the singular values go into up and down alike, so that both are of one size and 16 bits hold
    them well. clamp: a quantile above 0, at most 1; values of the factors beyond that quantile of their absolute values
    are cut to it, which tames outliers of an extraction. dtype: of the factors, float32 if not given.
    SdloraError: the change has fewer than two dimensions or is not finite, or clamp is out of range.
    """
    if clamp is not None and not (_number(clamp) and 0 < clamp <= 1):
        raise SdloraError(f"clamp {clamp!r} is out of range; give a quantile above 0, at most 1, such as 0.99")
    if change.dim() < 2:
        raise SdloraError(f"a change of shape {tuple(change.shape)} is no matrix and has no low-rank form")
    matrix = _finite(change.detach().double().flatten(1))
    values, vectors = _left(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
    vectors = vectors[:, : keep.count(values)]
    if matrix.shape[0] <= matrix.shape[1]:
        up, down = _balanced(vectors, vectors.T @ matrix)
    else:
        up, down = _balanced(matrix @ vectors, vectors.T)
    if clamp is not None:
        up, down = _clamped(up, down, clamp)
    up, down = up.to(dtype or torch.float32), down.to(dtype or torch.float32)
    kept = Kept(None, vectors.shape[1], _energy(values, vectors.shape[1]), _error(matrix, up, down))
    return shaped(up, down, change.shape), kept


def truncate(delta: LowRank, keep: Keep) -> tuple[LowRank, Kept]:
    """The nearest delta of fewer ranks, from the factors alone; a Tucker core is folded into down.

    The factors are float32, share the singular values evenly, and alpha is the new rank (scale 1), so that neither
    depends on how the delta was written before. SdloraError: the factors are not finite.
    """
    left, values, right = singular(delta)
    return _packed(left, values, right, keep, delta.shape, delta.rank)


def singular(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors and values of a low-rank delta: (out, n), (n,), (n, in * kh * kw), in float64.

    n is the rank, or less where out or in is. QR of both factors, then the SVD of the small matrix between them.
    """
    return _singular(*factor_pair(delta))


def as_low_rank(delta: Delta, shape: Shape, keep: Keep, base: Tensor | None = None) -> tuple[LowRank, Kept]:
    """Any change to a weight of this shape as plain LoRA, at the kept ranks.

    LoRA that loses no rank is returned as it is, a Tucker core apart. LoHa is a low-rank product of rank * rank and is
    truncated from its factors where that is less than the matrix has. LoKr has the products of its factors' singular
    values. All others are multiplied out and decomposed.
    base: the untouched weight, for laws that need it. SdloraError: it is needed and not given, or nothing fits.
    """
    check_fit(delta, shape)
    if len(shape) < 2:
        raise SdloraError(f"a {delta.name} delta of shape {tuple(shape)} is no matrix and has no low-rank form")
    if isinstance(delta, LowRank):
        if delta.mid is None and keep.keeps_all(delta.rank):
            return _reshaped(delta, shape), Kept(delta.rank, delta.rank, 1.0, 0.0)
        return _packed(*singular(delta), keep, shape, delta.rank)
    if isinstance(delta, Hadamard) and delta.t1 is None and delta.rank**2 < min(shape[0], prod(shape[1:])):
        return _packed(*_singular(*_face_splitting(delta)), keep, shape, delta.rank)
    if isinstance(delta, Kronecker):
        return _from_kronecker(delta, keep, shape)
    if not delta.linear and base is None:
        raise SdloraError(f"{delta.name} depends on the base model's weights; give that model to convert it")
    weight = linear_change(delta) if base is None else delta.weight(base)
    small, kept = decompose(weight.reshape(shape), keep)
    return small, Kept(delta.rank, kept.rank, kept.energy, kept.error)


def shaped(up: Tensor, down: Tensor, shape: Sequence[int]) -> LowRank:
    """up (out, rank) @ down (rank, in * kh * kw) as a delta of scale 1 for a weight of this shape."""
    rank, ones = down.shape[0], (1,) * len(shape[2:])
    return LowRank(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *ones), float(rank))


def _singular(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _finite(up)
    _finite(down)
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    return up_basis @ left, values, right @ down_basis.T


def _left(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (n,), largest first, and left vectors (n, n) of a float64 matrix (n, m) with n <= m.

    They are the eigenvectors of its Gram matrix. Squaring halves the digits: in float64 that leaves eight, more than
    an SVD in float32 has, in less time.
    """
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _face_splitting(delta: Hadamard) -> tuple[Tensor, Tensor]:
    """up (out, rank^2) and down (rank^2, in * kh * kw) of LoHa: (A B) * (C D) = (A . C)(B . D), row by row of up and
    column by column of down (the face-splitting product).
    """
    first, second = delta.w1_a.detach().double() * delta.scale, delta.w2_a.detach().double()
    up = (first[:, :, None] * second[:, None, :]).flatten(1)
    first, second = delta.w1_b.detach().double().flatten(1), delta.w2_b.detach().double().flatten(1)
    return up, (first[:, None] * second[None]).flatten(0, 1)


def _from_kronecker(delta: Kronecker, keep: Keep, shape: Shape) -> tuple[LowRank, Kept]:
    """The singular values of kron(a, b) are the products of those of a and b, its vectors their Kronecker products."""
    first, second = kronecker_factors(delta)
    left_1, values_1, right_1 = torch.linalg.svd(_finite(first), full_matrices=False)
    left_2, values_2, right_2 = torch.linalg.svd(_finite(second).flatten(1), full_matrices=False)
    values, order = torch.outer(values_1, values_2).flatten().sort(descending=True)
    order = order[: keep.count(values)]
    one, two = order // len(values_2), order % len(values_2)
    left = (left_1[:, None, one] * left_2[None, :, two]).flatten(0, 1)
    right = (right_1[one, :, None] * right_2[two, None, :]).flatten(1)
    return _packed(left, values, right, keep, shape, delta.rank)


def _packed(
    left: Tensor, values: Tensor, right: Tensor, keep: Keep, shape: Shape, rank_before: int | None
) -> tuple[LowRank, Kept]:
    rank = keep.count(values)
    root = values[:rank].sqrt()
    up, down = (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
    energy = _energy(values, rank)
    lost = float(values[rank:].norm() / values.norm()) if energy < 1 else 0.0
    return shaped(up, down, shape), Kept(rank_before, rank, energy, lost)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, its columns and rows of equal length; one of the two is orthonormal before."""
    ratio = (right.norm(dim=1) / left.norm(dim=0)).sqrt().nan_to_num(posinf=0)
    return left * ratio, right / ratio.where(ratio > 0, torch.ones_like(ratio))[:, None]


def _clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    sizes = torch.cat([up.flatten(), down.flatten()]).abs()
    bound = float(sizes.kthvalue(ceil(quantile * sizes.numel())).values)
    return up.clamp(-bound, bound), down.clamp(-bound, bound)


def _reshaped(delta: LowRank, shape: Shape) -> LowRank:
    if delta.shape == tuple(shape):
        return delta
    rank, ones = delta.rank, (1,) * len(shape[2:])
    return LowRank(delta.down.reshape(rank, *shape[1:]), delta.up.reshape(shape[0], rank, *ones), delta.alpha)


def _energy(values: Tensor, rank: int) -> float:
    squares = values.square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0


def _error(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    """|up @ down - matrix| / |matrix| without the product; down to 1e-8, where float64 runs out of digits."""
    up, down = up.double(), down.double()
    total = float(matrix.square().sum())
    shared = float(((up.T @ matrix) * down).sum())
    own = float(((up.T @ up) * (down @ down.T)).sum())
    return (max(total - 2 * shared + own, 0.0) / total) ** 0.5 if total else 0.0


def _reaching(parts: Tensor, share: float) -> int:
    """The fewest parts whose sum reaches this share of the whole."""
    return int((parts.cumsum(0) < share * parts.sum()).sum()) + 1


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise SdloraError("the change holds values that are not finite; the file or the model it came from is damaged")
    return matrix


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
