"""Files as HCP-Diffusion writes them, for the tests of reading: its names and its law of scale, from an adapter."""

from collections.abc import Iterable

from torch import Tensor, tensor

from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank

# SDXL's text encoders are one module there, and share a file; SD1's stands alone under its own names.
ENCODERS = {"text_encoder": "clip_B.", "text_encoder_2": "clip_bigG."}
# Before December 2023 the factors were Linear and Conv2d modules, since then parameters of the layer.
NEW = {"down": "layer.W_down", "up": "layer.W_up", "scale": "alpha"}
OLD = {"down": "layer.lora_down.weight", "up": "layer.lora_up.weight", "scale": "alpha"}


def hcp_tensors(adapter: Adapter, components: Iterable[str], old: bool = False) -> dict[str, Tensor]:
    """The tensors of one of HCP-Diffusion's files: {"unet"} or the text encoders, which it writes apart.

    What it calls alpha is alpha / rank already. Only low-rank deltas without a core can be written.
    """
    names, tensors = OLD if old else NEW, {}
    sdxl = any(path.startswith("text_encoder_2.") for path in adapter.deltas)
    for path, delta in adapter.deltas.items():
        component, _, module = path.partition(".")
        if component not in components:
            continue
        assert isinstance(delta, LowRank) and delta.mid is None, f"{path}: HCP-Diffusion has no {delta.name}"
        stem = f"lora:{ENCODERS.get(component, '') if sdxl else ''}{module}.___."
        values = {"down": delta.down, "up": delta.up, "scale": tensor(float(delta.scale))}
        tensors |= {stem + name: values[part] for part, name in names.items()}
    return tensors
