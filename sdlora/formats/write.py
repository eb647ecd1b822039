"""Writing LoRA files: whole or not at all, in names that other programs read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.formats.atomic import replace_file
from sdlora.formats.names import NAMINGS, kohya
from sdlora.lowrank.adapter import Adapter


def write(adapter: Adapter, path: Path | str, naming: str = "kohya") -> None:
    """Write an adapter in float32, with its metadata, to a .safetensors file.

    naming: kohya, which A1111, Forge and ComfyUI read and which carries alpha; or diffusers. Names of the latter carry
    no alpha, and few programs look for it elsewhere: there alpha / rank is multiplied into the up factors.
    SdloraError: nothing to write, an unknown naming, or a place that cannot be written to.
    """
    path = Path(path)
    if naming not in NAMINGS:
        raise SdloraError(f"unknown naming {naming!r}; it is one of {', '.join(NAMINGS)}")
    if not adapter.deltas:
        raise SdloraError(f"nothing to write to {path}: the adapter is empty")
    tensors = _kohya(adapter) if naming == "kohya" else _diffusers(adapter)
    tensors = {key: tensor.detach().cpu().float().contiguous() for key, tensor in tensors.items()}
    # Alphas are in the tensors now; told a second time, they would be applied a second time.
    metadata = {name: text for name, text in adapter.metadata.items() if name != "lora_adapter_metadata"}
    content = save(tensors, {**metadata, **_summary(adapter, tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise SdloraError(f"{path} cannot be written ({error.strerror or error}); name another place") from error


def _kohya(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    two_encoders = adapter.metadata.get("ss_base_model_version", "").startswith("sdxl")
    for path, name in kohya(adapter.deltas, two_encoders).items():
        delta = adapter.deltas[path]
        tensors[f"{name}.lora_down.weight"] = delta.down
        tensors[f"{name}.lora_up.weight"] = delta.up
        tensors[f"{name}.alpha"] = torch.tensor(delta.alpha)
    return tensors


def _diffusers(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for path, delta in adapter.deltas.items():
        tensors[f"{path}.lora_A.weight"] = delta.down
        tensors[f"{path}.lora_B.weight"] = delta.up.float() * delta.scale
    return tensors


def _summary(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What other programs show of any LoRA: rank, alpha and the hash of all that follows the header."""
    ranks = {delta.rank for delta in adapter.deltas.values()}
    alphas = {delta.alpha for delta in adapter.deltas.values()}
    body = _after_header(save(dict(tensors)))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
    }


def _after_header(content: bytes) -> bytes:
    """A .safetensors file starts with the length of its header in 8 bytes."""
    return content[8 + int.from_bytes(content[:8], "little") :]
