"""What is measured upon: pipelines with UNets of the real sizes and random weights, and LoRA files for them.

The weights are written to a folder as models are handed out, number after number, so that a UNet of 10 GB needs none in
memory; the pipelines are loaded from there by diffusers, and their untouched weights can be read back from there.
"""

import json
import os
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.lowrank.targets import modules_of
from sdlora.models.load import load_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDTHS = {"sd15": (320, 640, 1280, 1280), "sdxl": (320, 640, 1280)}  # channels of the levels
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Setting:
    """model: sd15 or sdxl. stored: the dtype of the model's file; it is computed with in float32.

    loaded: how many adapters are loaded at most.
    """

    folder: str
    model: str = "sd15"
    widths: tuple[int, ...] = WIDTHS["sd15"]
    stored: str = "float32"
    rank: int = 16
    pixels: int = 256
    rounds: int = 10
    loaded: int = 50

    @property
    def applied(self) -> int:
        """How many adapters are applied at most."""
        return min(8, self.loaded)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many adapters are applied at a time."""
        return tuple(count for count in (1, 3, 8) if count <= self.applied)

    def lora(self, number: int) -> str:
        """The file of a LoRA; there is one more than are loaded."""
        return str(Path(self.folder, "loras", f"lora {number}.safetensors"))

    def json(self) -> str:
        return json.dumps(asdict(self))


def setting_of(text: str) -> Setting:
    told = json.loads(text)
    return Setting(**{**told, "widths": tuple(told["widths"])})


def build(setting: Setting) -> None:
    """Write the model and the LoRA files, unless the folder has them already."""
    folder = Path(setting.folder)
    told, done = f"{setting.model} {setting.widths} {setting.stored} {setting.rank}", folder / "built.txt"
    if done.exists() and done.read_text() != told:
        raise SystemExit(f"{folder} holds {done.read_text()}, not {told}; give another --folder")
    unet, generator = _unet(setting), torch.Generator().manual_seed(0)
    if not done.exists():
        unet.save_config(folder / "unet")
        (folder / "model_index.json").write_text("{}")
        _write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unet, setting.stored, generator)
        done.write_text(told)
    for number in range(setting.loaded + 1):
        path = Path(setting.lora(number))
        if not path.exists():
            write(_adapter(unet, setting.rank, generator.manual_seed(number)), path, dtype=torch.float16)


def pipeline_of(setting: Setting) -> Any:
    """diffusers' pipeline over the UNet of the folder. Its text encoders are tiny: no LoRA here touches them."""
    loaded = UNet2DConditionModel.from_pretrained(Path(setting.folder, "unet"), torch_dtype=torch.float32)
    unet: Any = loaded.eval().requires_grad_(False)
    words = load_pipeline("toybox").tokenizer
    tiny = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
    text: Any = CLIPTextModel(tiny)
    none: Any = None
    if setting.model == "sd15":
        return StableDiffusionPipeline(none, text, words, unet, none, none, none, requires_safety_checker=False)
    second = CLIPTextModelWithProjection(tiny)
    return StableDiffusionXLPipeline(none, text, second, words, words, unet, none, add_watermarker=False)


def inputs(unet: Any, pixels: int) -> dict[str, Any]:
    """Of one step: the batch of two that guidance needs."""
    generator = torch.Generator().manual_seed(0)
    told: dict[str, Any] = {
        "sample": torch.randn(2, 4, pixels // 8, pixels // 8, generator=generator),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type:
        told["added_cond_kwargs"] = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.full((2, 6), pixels)}
    return told


def _unet(setting: Setting) -> Any:
    """Its shapes alone."""
    widths = setting.widths
    told = {**SDXL, "attention_head_dim": tuple(max(width // 64, 1) for width in widths)}
    config: dict[str, Any] = told if setting.model == "sdxl" else {"cross_attention_dim": 768}
    with torch.device("meta"):
        return UNet2DConditionModel(block_out_channels=widths, **config)


def _write_weights(path: Path, unet: Any, stored: str, generator: torch.Generator) -> None:
    """Random weights as a safetensors file, one tensor at a time in memory."""
    dtype: torch.dtype = getattr(torch, stored)
    kind, end = {"float32": "F32", "float16": "F16"}[stored], 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (begin, end)}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, shape in shapes.items():
            _write_tensor(file, _numbers(name, shape, generator).to(dtype))
    os.utime(path, (1e9, 1e9))  # as if it had lain there long: what was written just now is not mapped


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.numpy().data)


def _numbers(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What keeps activations of about one size: torch's own bounds, norms that change nothing."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    bound = prod(shape[1:]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _adapter(unet: Any, rank: int, generator: torch.Generator) -> Adapter:
    """Random low-rank deltas on all attention projections."""
    deltas = {}
    for path, module in modules_of({"unet": unet}).items():
        if path.endswith(ATTENTION):
            rows, columns = module.weight.shape
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            deltas[path] = LowRank(down, torch.randn(rows, rank, generator=generator) * 0.01, float(rank))
    return Adapter(deltas)
