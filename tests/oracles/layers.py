"""What the oracle tests share: layers to change, factors of unit order, and the measure of agreement."""

import warnings
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

OUT, IN = 24, 16
SHAPES = {"linear": (OUT, IN), "conv1x1": (OUT, IN, 1, 1), "conv3x3": (OUT, IN, 3, 3)}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def layer_of(base: Tensor, bias: Tensor | None = None) -> nn.Linear | nn.Conv2d:
    """A layer with this weight, and with this bias or none."""
    has_bias = bias is not None
    layer: nn.Linear | nn.Conv2d
    if base.dim() == 2:
        layer = nn.Linear(base.shape[1], base.shape[0], bias=has_bias)
    else:
        layer = nn.Conv2d(base.shape[1], base.shape[0], base.shape[2], padding=base.shape[2] // 2, bias=has_bias)
    layer.weight.data = base.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def in_peft(config: Any, layer: nn.Module) -> Any:
    """The layer as peft wraps it; its one adapter, "default", filled with random numbers."""
    config.target_modules = ["layer"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's BOFT looks for a compiler
        wrapped = inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))["layer"]
    for index, (name, parameter) in enumerate(wrapped.named_parameters()):
        if "base_layer" not in name:
            parameter.data = draw(*parameter.shape, seed=index, scale=0.5)
    return wrapped.eval()


def factors_in(wrapped: nn.Module) -> dict[str, Tensor]:
    """The factors of the adapter "default" under their names: {"hada_w1_a": ...}."""
    named = {name: parameter.detach() for name, parameter in wrapped.named_parameters() if "base_layer" not in name}
    return {name.replace(".default", "").removesuffix(".weight"): factor for name, factor in named.items()}


def merged_change(wrapped: Any) -> Tensor:
    """W' - W as peft merges it."""
    before = wrapped.get_base_layer().weight.detach().double().clone()
    wrapped.merge()
    return (wrapped.get_base_layer().weight.detach().double() - before).float()


def assert_agree(found: Tensor, wanted: Tensor) -> None:
    """float32, and apart by no more than 1e-6 of the largest number."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    largest, apart = wanted.abs().max().item(), (found.double() - wanted.double()).abs().max().item()
    assert largest > 0.01 and apart <= 1e-6 * largest, f"{apart:.2e} apart, {apart / largest:.2e} of {largest:.2e}"
