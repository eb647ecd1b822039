"""What a parameter holds with a mix: the untouched one and all its deltas, summed in float32 and rounded once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import Delta, LowRank
from sdlora.lowrank.laws.delta import check_fit, wide

Terms = tuple[tuple[Delta, float], ...]  # deltas and their weights; the order decides the last bits of the sum

# Rows of other widths are multiplied by BLAS libraries in ways that differ with where in memory they begin.
EVEN = 16


@torch.no_grad()
def merge(untouched: Tensor, terms: Terms, out: Tensor) -> None:
    """out = untouched + sum(weight * delta), in float32, rounded once to out's dtype. The same terms, the same bits.

    `untouched` and `out` have one shape and are not the same memory. SdloraError: a delta does not fit, or the sum
    overflows the dtype; `out` is of no use then.
    """
    untouched = untouched.to(out.device)  # a model may have been moved since
    direct = out.dtype == torch.float32 and out.is_contiguous() and out[0].numel() % EVEN == 0
    total = out if direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    total.copy_(untouched)
    pairs = [(delta, weight) for delta, weight in terms if isinstance(delta, LowRank) and delta.mid is None]
    if pairs:
        _add_pairs(total, pairs)
    for delta, weight in terms:
        if not isinstance(delta, LowRank) or delta.mid is not None:
            total += weight * delta.weight(untouched)
    if not direct:
        out.copy_(total)
    if not _finite(out):
        raise SdloraError(f"the mix overflows {str(out.dtype).removeprefix('torch.')}; use smaller weights")


def _add_pairs(total: Tensor, pairs: Sequence[tuple[LowRank, float]]) -> None:
    """total += [w1 up1 | w2 up2 ...] @ [down1; down2; ...]: one product for any number of adapters.

    Nothing as large as the parameter is made on the way.
    """
    for delta, _ in pairs:
        check_fit(delta, total.shape)
    up = torch.cat([wide(delta.up, total).flatten(1) * (delta.scale * weight) for delta, weight in pairs], 1)
    down = torch.cat([wide(delta.down, total).flatten(1) for delta, _ in pairs])
    total.view(len(total), -1).addmm_(up, down)


def _finite(parameter: Tensor) -> bool:
    """Whether all values are. Infinities and NaN show in the sum, so that mostly one quick pass is enough."""
    return bool(parameter.sum().isfinite()) or bool(parameter.isfinite().all())
