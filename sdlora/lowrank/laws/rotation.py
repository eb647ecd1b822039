"""What the orthogonal laws share: rotations by Cayley's formula, and the order of a butterfly.

A rotation R is kept as its turn R - I, so that a small one loses no digits.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import width_of

if TYPE_CHECKING:
    from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """R - I for R = (I + Q) (I - Q)^-1, of skew-symmetric matrices Q (..., b, b)."""
    import torch

    identity = torch.eye(skew.shape[-1], device=skew.device)
    return torch.linalg.solve(identity - skew, 2 * skew)  # the two commute


def butterfly(turns: Tensor, weight: Tensor, *, interleaved: bool) -> Tensor:
    """What the stages of a butterfly add to a weight (width, ...) along its first axis (BOFT, arXiv:2311.06243).

    turns: (m, n, b, b) with n * b the width. A block of stage i turns b / 2 neighbours together with those that lie
    2^i * b / 2 further on: pair by pair if `interleaved`, else the ones behind the others.
    """
    import torch

    stages, _, size, _ = turns.shape
    flat = weight.reshape(weight.shape[0], -1)
    change = torch.zeros_like(flat)
    order = (0, 2, 3, 1, 4) if interleaved else (0, 2, 1, 3, 4)
    back = (0, 3, 1, 2, 4) if interleaved else order
    for stage in range(stages):
        halves = (flat + change).unflatten(0, (-1, 2, 2**stage, size // 2)).permute(order)
        turned = turns[stage] @ halves.reshape(-1, size, flat.shape[1])
        change = change + turned.reshape(halves.shape).permute(back).reshape(flat.shape)
    return change.reshape(weight.shape)


def check_blocks(shape: tuple[int, ...], dimensions: int) -> None:
    """Refuse what is not (n, b, b) or, with 4 dimensions, (m, n, b, b): m stages that n blocks have room for."""
    wanted = "(n, b, b)" if dimensions == 3 else "(m, n, b, b)"
    if len(shape) != dimensions or shape[-1] != shape[-2] or not prod(shape):
        raise SdloraError(f"{shape} are no blocks of rotations; {wanted} is wanted")
    if dimensions == 4:
        stages, blocks, size, _ = shape
        # An exponent out of a file is bounded before it is raised.
        if size % 2 or stages > blocks.bit_length() or blocks % 2 ** (stages - 1):
            raise SdloraError(f"{blocks} blocks of {size} cannot be the {stages} stages of a butterfly")


def check_scale(scale: Tensor | None, width: int | None = None) -> None:
    """Refuse a scale of outputs that is not (out,), or out with ones beside it; `width` is out where it is known."""
    if scale is None:
        return
    shape = tuple(scale.shape)
    if width_of(shape) is None or width not in (None, prod(shape)):
        raise SdloraError(f"{shape} is no scale of {'the' if width is None else width} outputs; (out, 1) is wanted")
