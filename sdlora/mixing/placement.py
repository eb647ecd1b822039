"""Where a base's weights lie and in what form: whether adapters can be merged into them, and what they say there."""

from typing import Any

import torch
from torch import Tensor, nn

from sdlora.errors import SdloraError
from sdlora.lowrank.targets import shape_of

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def obstacle(root: nn.Module) -> str:
    """Why adapters cannot be merged into a module or a whole component, "" if they can: quantised or offloaded."""
    for module in root.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("group_offloading") is not None:
            return "its weights are offloaded in groups"
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if weight.is_meta:
            return "its weights are offloaded"
        if not _plain(weight):
            kind = str(weight.dtype)[6:] if type(weight) is nn.Parameter else type(weight).__name__
            return f"its weights are quantised ({kind})"
    return ""


@torch.no_grad()
def readable(module: Any, attribute: str, path: str) -> Tensor | None:
    """The numbers of a weight or bias in a plain floating dtype, wherever they lie; None for a bias that is not there.

    What is plain comes as it is, not copied. SdloraError, which names the path, for numbers that cannot be read.
    """
    value = getattr(module, attribute)
    if value is not None and value.is_meta:
        value = _offloaded(module, attribute)
        if value is None:
            raise SdloraError(
                f"{path}: its {attribute} is offloaded where it cannot be read; load it without offloading"
            )
    if value is None or _plain(value):
        return value
    if type(value) in (Tensor, nn.Parameter) and value.is_floating_point():  # float8
        return value.float()
    # Every tensor has dequantize(); only that of a type of its own knows what the numbers mean.
    if type(value).dequantize is not Tensor.dequantize:
        plain = value.dequantize()
        if tuple(plain.shape) == shape_of(module, attribute):
            return plain
    raise SdloraError(
        f"{path}: the change depends on the base's {attribute}, which is quantised ({type(value).__name__}) and cannot"
        " be read; load the base unquantised, or turn the LoRA into a plain one with `sdlora resize`"
    )


def _plain(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.dtype in PLAIN


def _offloaded(module: Any, attribute: str) -> Tensor | None:
    """What accelerate brings for the time of a forward."""
    outer = getattr(module, "_hf_hook", None)
    for hook in getattr(outer, "hooks", (outer,)):
        kept = getattr(hook, "weights_map", None)
        if kept is not None:
            return kept[attribute]
    return None
