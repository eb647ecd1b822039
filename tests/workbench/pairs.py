"""Small LoRAs of toybox, and what is told of two of them."""

from pathlib import Path
from typing import Any

import torch

from sdlora.formats.architectures import toybox
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.workbench.conflicts import Conflicts, conflicts

DOWN, MIDDLE, UP = "unet.down_blocks.0.attentions.0", "unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0"
QUERY, VALUE = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_v"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
MODULES = (f"{DOWN}.{QUERY}", f"{DOWN}.{VALUE}", f"{MIDDLE}.{QUERY}", f"{UP}.{VALUE}", TEXT)


def low_rank(module: str, seed: int, rank: int = 3, size: float = 1.0) -> LowRank:
    out, into = toybox().shapes[module][:2]
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, into, generator=generator) / into**0.5
    return LowRank(down, torch.randn(out, rank, generator=generator) * size, rank / 2)


def scaled(delta: LowRank, factor: float) -> LowRank:
    return LowRank(delta.down, delta.up * factor, delta.alpha)


def saved(path: Path, deltas: dict[str, Any]) -> Path:
    write(Adapter(deltas), path, overwrite=True)
    return path


def told(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], base: Checkpoint | None = None) -> Conflicts:
    return conflicts([saved(tmp_path / "A.safetensors", first), saved(tmp_path / "B.safetensors", second)], base)
