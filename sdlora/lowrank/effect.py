"""The factors of a delta, and what they tell without their product: its Frobenius norm above all.

Nothing here imports torch, so that whoever only describes files can import it.
"""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

from sdlora.lowrank.laws import Delta, Full, Kronecker, LowRank
from sdlora.lowrank.laws.delta import factors
from sdlora.lowrank.laws.product import product

if TYPE_CHECKING:
    from torch import Tensor


def factor_pair(delta: LowRank) -> tuple[Tensor, Tensor]:
    """up (out, rank) with the scale in it, and down (rank, in * kh * kw), in float64; up @ down is the delta.

    A Tucker core goes into down: down'[m, i, h, w] = sum over n of mid[m, n, h, w] down[n, i], which is exact.
    """
    up = delta.up.detach().double().flatten(1) * delta.scale
    down = delta.down.detach().double().flatten(1)
    if delta.mid is not None:
        mid = delta.mid.detach().double()
        down = (mid.flatten(2).transpose(1, 2) @ down).transpose(1, 2).flatten(1)  # (m, hw, n) @ (n, i)
    return up, down


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of about one size, so that 16 bits hold both; moved by a power of two, exactly."""
    ratio = float(up.norm() / down.norm())
    power = 2.0 ** round(log2(ratio) / 2) if 0 < ratio < float("inf") else 1.0
    return up / power, down * power


def norm(delta: LowRank) -> float:
    """The Frobenius norm of a low-rank delta, accumulated in float64.

    |up @ down|^2 = sum((up^T up) * (down down^T)): two matrices of (rank, rank), never the product.
    """
    up, down = factor_pair(delta)
    return _root(((up.T @ up) * (down @ down.T)).sum())


def norm_of(delta: Delta, base: Tensor | None = None) -> float | None:
    """The Frobenius norm of any delta. None where the law needs the base weight and `base` is not given.

    base: the untouched weight. SdloraError where it does not fit.
    """
    if isinstance(delta, LowRank):
        return norm(delta)
    if isinstance(delta, Full):
        return _length(delta.diff)
    if isinstance(delta, Kronecker):
        first, second = kronecker_factors(delta)
        return _length(first) * _length(second)  # |kron(a, b)| = |a| |b|
    if base is not None:
        return _length(delta.weight(base))
    return _length(linear_change(delta)) if delta.linear else None


def linear_change(delta: Delta) -> Tensor:
    """The change of a linear law, in the shape its factors tell, where they are and without any base."""
    some = next(iter(factors(delta).values()))
    return delta.weight(some.new_zeros(()).expand(delta.shape))


def kronecker_factors(delta: Kronecker) -> tuple[Tensor, Tensor]:
    """w1 (out1, in1) with the scale in it, and w2 (out2, in2[, kh, kw]), in float64; kron(w1, w2) is the delta."""
    first = _whole(delta.w1, delta.w1_a, delta.w1_b, None) * delta.scale
    return first, _whole(delta.w2, delta.w2_a, delta.w2_b, delta.t2)


def _whole(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    """A factor of LoKr, from its pair (round a core, a is (rank, out)) where it has one."""
    if whole is not None:
        return whole.detach().double()
    assert a is not None and b is not None
    a, b = a.detach().double(), b.detach().double()
    return product(a, b) if core is None else product(a.T, b, core.detach().double())


def _length(values: Tensor) -> float:
    return _root(values.detach().double().square().sum())


def _root(square: Tensor) -> float:
    return max(float(square), 0.0) ** 0.5 if float(square) == float(square) else float("nan")
