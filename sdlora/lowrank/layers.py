"""Trainable low-rank layers: each wraps a frozen module and adds alpha / rank * up(down(x)) to what it gives.

Lean on purpose: the product is added in place to the base's output, which autograd does not need again, and the scale
rides along in that addition. The factors are float32 and take part in the dtype of the base's output, so autocast and
a bf16 or fp16 base both work.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import Delta, LowRank

# torch's own initialisation would draw from the global generator; on the meta device it draws nothing.
UNDRAWN: dict[str, Any] = {"device": "meta", "dtype": torch.float32}


class LoRALinear(nn.Module):
    """y = base(x) + alpha / rank * up(down(dropout(x))), x of shape (..., in), arXiv:2106.09685."""

    base: nn.Linear
    down: nn.Linear
    up: nn.Linear

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base  # first, so that the model's first parameter, which tells its dtype, stays the base's
        self.down = nn.Linear(base.in_features, rank, bias=False, **UNDRAWN)
        self.up = nn.Linear(rank, base.out_features, bias=False, **UNDRAWN)
        self.alpha, self.dropout = alpha, dropout
        self.train(base.training)
        _initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        x_ni = x.reshape(-1, x.shape[-1])  # two-dimensional, for an in-place addmm_ on a view costs autograd a copy
        y_no: Tensor = self.base(x_ni)
        h_nr = functional.linear(_dropped(self, x_ni).to(y_no.dtype), self.down.weight.to(y_no.dtype))
        y_no.addmm_(h_nr, self.up.weight.to(y_no.dtype).t(), alpha=scale_of(self))
        return y_no.view(*x.shape[:-1], y_no.shape[-1])


class LoRAConv2d(nn.Module):
    """y = base(x) + alpha / rank * up(down(dropout(x))), x of shape (batch, in, height, width).

    The LoCon form (arXiv:2309.14859): down has the base's kernel, stride, padding and dilation, up is 1x1.
    """

    base: nn.Conv2d
    down: nn.Conv2d
    up: nn.Conv2d

    def __init__(
        self, base: nn.Conv2d, rank: int, alpha: float, dropout: float = 0.0, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        if base.groups != 1:
            raise SdloraError(
                f"a convolution with groups={base.groups} cannot carry a LoRA; leave it out of the targets"
            )
        self.base = base
        form = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        self.down = nn.Conv2d(base.in_channels, rank, bias=False, **form, **UNDRAWN)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False, **UNDRAWN)
        self.alpha, self.dropout = alpha, dropout
        self.train(base.training)
        _initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        # _conv_forward is conv2d with the module's own stride, padding and padding mode, and a weight of our choice.
        h = self.down._conv_forward(_dropped(self, x).to(y.dtype), self.down.weight.to(y.dtype), None)
        return y.add_(functional.conv2d(h, self.up.weight.to(y.dtype)), alpha=scale_of(self))


LoRALayer = LoRALinear | LoRAConv2d


def wrap(base: nn.Module, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> LoRALayer:
    """The trainable layer for a Linear or Conv2d; it has no effect until it is trained. Other modules: SdloraError."""
    if isinstance(base, nn.Linear):
        return LoRALinear(base, rank, alpha, dropout, generator=generator)
    if isinstance(base, nn.Conv2d):
        return LoRAConv2d(base, rank, alpha, dropout, generator=generator)
    raise SdloraError(f"{type(base).__name__} cannot carry a LoRA; only Linear and Conv2d can")


def scale_of(layer: LoRALayer) -> float:
    """alpha / rank."""
    return layer.alpha / layer.down.weight.shape[0]


def delta_of(layer: LoRALayer) -> LowRank:
    """What the layer has learned, as copies on the CPU."""
    down, up = (factor.weight.detach().to("cpu", copy=True) for factor in (layer.down, layer.up))
    return LowRank(down=down, up=up, alpha=layer.alpha)


def check_fit(layer: LoRALayer, delta: Delta) -> LowRank:
    """The delta, if the layer can take it; SdloraError for another law, shape or rank."""
    weight, rank = layer.base.weight, layer.down.weight.shape[0]
    if not isinstance(delta, LowRank) or delta.mid is not None:
        raise SdloraError(f"the delta is a {delta.name}; only plain low-rank ones can be trained further")
    if not delta.fits(weight.shape):
        raise SdloraError(f"a delta of shape {delta.shape} does not fit a weight of shape {tuple(weight.shape)}")
    if delta.rank != rank:
        raise SdloraError(f"the delta has rank {delta.rank}, the layer has rank {rank}; wrap with the delta's rank")
    return delta


@torch.no_grad()
def copy_into(layer: LoRALayer, delta: LowRank) -> None:
    """Put the factors and alpha of a delta that fits into the layer."""
    layer.down.weight.copy_(delta.down.reshape(layer.down.weight.shape))
    layer.up.weight.copy_(delta.up.reshape(layer.up.weight.shape))
    layer.alpha = delta.alpha


@torch.no_grad()
def _initialise(layer: LoRALayer, generator: torch.Generator) -> None:
    """Up = 0 (arXiv:2106.09685, section 4.1), down Kaiming uniform with a = sqrt(5) as in the paper's own code."""
    layer.down.to_empty(device=layer.base.weight.device)
    layer.up.to_empty(device=layer.base.weight.device)
    drawn = torch.empty(layer.down.weight.shape, dtype=torch.float32, device=generator.device)
    layer.down.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
    layer.up.weight.zero_()


def _dropped(layer: LoRALayer, x: Tensor) -> Tensor:
    """Dropout draws from torch's global generator: gradient checkpointing rewinds that one and no other."""
    return functional.dropout(x, layer.dropout) if layer.dropout and layer.training else x
