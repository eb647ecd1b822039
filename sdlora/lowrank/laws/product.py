"""The product of a pair of factors, with or without the core of a Tucker decomposition between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdlora.lowrank.laws.delta import Shape, wide

if TYPE_CHECKING:
    from torch import Tensor


def product_shape(up: Sequence[int], down: Sequence[int], core: Sequence[int] | None = None) -> Shape | None:
    """Shape of the product, (out, in) or (out, in, kh, kw); None where the factors do not belong together.

    up: (out, rank[, 1, 1]). down: (rank, in[, kh, kw]), or (rank, in[, 1, 1]) round a core (rank, rank, kh, kw).
    """
    up, down = tuple(up), tuple(down)
    if up[2:] not in ((), (1, 1)) or len(up) < 2 or len(down) not in (2, 4) or up[1] != down[0] or up[1] == 0:
        return None
    if core is None:
        return (up[0], *down[1:])
    core = tuple(core)
    if len(core) != 4 or core[:2] != (up[1], up[1]) or down[2:] not in ((), (1, 1)):
        return None
    return (up[0], down[1], *core[2:])


def product(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """up @ down as (out, in) or, for convolutions, (out, in, kh, kw).

    With a core it is the sum over m, n of up[o, m] core[m, n, h, w] down[n, i].
    """
    up_or, down_ri = up.flatten(1), down.flatten(1)
    if core is None:
        return (up_or @ down_ri).unflatten(1, down.shape[1:])
    # (out, m) @ (m, n kh kw) first, then n with down: two products, no einsum over five indices.
    wide_onk = (up_or @ core.flatten(1)).unflatten(1, (core.shape[1], -1))
    return (down_ri.T @ wide_onk).unflatten(2, core.shape[2:])


def pair_shape(a: Tensor, b: Tensor, core: Tensor | None) -> Shape | None:
    """Shape of the product of a and b as LyCORIS lays them out: round a core, a is (rank, out)."""
    return product_shape(a.shape, b.shape) if core is None else product_shape(a.shape[::-1], b.shape, core.shape)


def pair_product(a: Tensor, b: Tensor, core: Tensor | None, base: Tensor) -> Tensor:
    """The product of a and b as LyCORIS lays them out, in float32 beside the base."""
    if core is None:
        return product(wide(a, base), wide(b, base))
    return product(wide(a, base).T, wide(b, base), wide(core, base))
