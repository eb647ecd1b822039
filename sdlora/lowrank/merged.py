"""What a parameter holds with a mix: the untouched one and all its deltas, summed in float32 and rounded once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import Delta, LowRank
from sdlora.lowrank.laws.delta import check_fit, wide

Terms = tuple[tuple[Delta, float], ...]  # deltas and their weights; the order decides the last bits of the sum

# Values that are computed at a time on a CPU: few enough for its caches and for memory that is at hand, not fetched
# from the system and given back each time; many enough to keep its cores at work.
BLOCK = 2**19
# oneDNN's product of matrices; None in builds of torch without it.
ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


@torch.no_grad()
def merge(untouched: Tensor, terms: Terms, out: Tensor) -> None:
    """out = untouched + sum(weight * delta), in float32, rounded once to out's dtype. The same terms, the same bits.

    `untouched` and `out` have one shape and are not the same memory. SdloraError: a delta does not fit, or the sum
    overflows the dtype; `out` is of no use then.
    """
    untouched = untouched.to(out.device)  # a model may have been moved since
    pairs = [(delta, weight) for delta, weight in terms if isinstance(delta, LowRank) and delta.mid is None]
    rest = None
    for delta, weight in terms:
        if not isinstance(delta, LowRank) or delta.mid is not None:
            change = weight * delta.weight(untouched)
            rest = change if rest is None else rest + change
    if pairs:
        _add_pairs(untouched, pairs, rest, out)
    elif rest is not None:
        torch.add(untouched, rest, out=out)
    else:
        out.copy_(untouched)
    if not _finite(out):
        raise SdloraError(f"the mix overflows {str(out.dtype).removeprefix('torch.')}; use smaller weights")


def _add_pairs(untouched: Tensor, pairs: Sequence[tuple[LowRank, float]], rest: Tensor | None, out: Tensor) -> None:
    """out = untouched + rest + [w1 up1 | w2 up2 ...] @ [down1; down2; ...]: one product for any number of adapters."""
    for delta, _ in pairs:
        check_fit(delta, out.shape)
    up = torch.cat([wide(delta.up, out).flatten(1) * (delta.scale * weight) for delta, weight in pairs], 1)
    down = torch.cat([wide(delta.down, out).flatten(1) for delta, _ in pairs])
    rows = max(1, BLOCK // down.shape[1]) if out.device.type == "cpu" else len(out)
    for first in range(0, len(out), rows):
        block = slice(first, first + rows)
        change = _product(up[block], down).view(-1, *out.shape[1:])
        if rest is not None:
            change += rest[block]
        torch.add(untouched[block], change, out=out[block])


def _product(up: Tensor, down: Tensor) -> Tensor:
    """up @ down: by oneDNN on a CPU, which has kernels for all of them, where MKL makes half use of those of AMD."""
    if ONEDNN is not None and up.device.type == "cpu":
        return ONEDNN(up, down.T, None, "none", [], "")
    return up @ down


def _finite(parameter: Tensor) -> bool:
    """Whether all values are. Infinities and NaN show in the sum, so that mostly one quick pass is enough."""
    return bool(parameter.sum().isfinite()) or bool(parameter.isfinite().all())
