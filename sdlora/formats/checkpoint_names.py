"""Where the parameters of a base model lie in its files, in diffusers' folders and in the original single files.

The original code (ldm, sgm) counts the UNet's blocks through, and its OpenCLIP encoders keep query, key and value in
one tensor. Paths are spelled forward, as the file's own shapes say that the model is built; none is taken apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.formats.architectures import UNetPlan, has_bias, unet_modules
from sdlora.formats.names import original_unet

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

UNET = "model.diffusion_model."
# By their prefix in single files: text encoders in transformers' names (CLIP-L of SD 1.x and SDXL) ...
CLIP = {"cond_stage_model.transformer.": "text_encoder", "conditioner.embedders.0.transformer.": "text_encoder"}
# ... and in OpenCLIP's, with the number of last layers that diffusers leaves out (ViT-H of SD 2.x, bigG of SDXL).
OPENCLIP = {"cond_stage_model.model.": ("text_encoder", 1), "conditioner.embedders.1.model.": ("text_encoder_2", 0)}

_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_FUSED = ("q_proj", "k_proj", "v_proj")  # in this order in attn.in_proj_weight and attn.in_proj_bias


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: a tensor of a file, or some rows of it, or the tensor transposed."""

    file: Path
    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The parameter as a view of the file's tensor: what is written into it is written into the tensor."""
        rows = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return rows.T if self.transposed else rows

    def shape(self, whole: Shape) -> Shape:
        """The parameter's shape, given that of the file's tensor."""
        shape = whole if self.rows is None else (self.rows[1] - self.rows[0], *whole[1:])
        return shape[::-1] if self.transposed else shape


def component_places(component: str, file: Path, keys: Iterable[str]) -> dict[str, Place]:
    """The parameters of a component in diffusers' and transformers' names, by our path."""
    level = "text_model." if component.startswith("text_encoder") else ""
    found = {}
    for key in keys:
        module, _, kind = key.rpartition(".")
        if kind in ("weight", "bias") and module:
            kept = "" if module.startswith(("text_model.", "text_projection")) else level
            found[_parameter(f"{component}.{kept}{module}", kind)] = Place(file, key)
    return found


def single_file_places(file: Path, shapes: Shapes) -> dict[str, Place]:
    """The parameters of an original single file, by our path.

    Those that the model must have and the file lacks are among them: see which keys are not in `shapes`. Empty where
    the file has no UNet of Stable Diffusion under its original names.
    """
    try:
        plan = _plan({key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)})
    except IndexError:  # a tensor with fewer axes than its name promises
        return {}
    if plan is None or not any(plan.transformer_layers):
        return {}
    places = {path: Place(file, f"{UNET}{name}") for path, name in _unet(plan)}
    for prefix, component in CLIP.items():
        keys = (key.removeprefix(prefix) for key in shapes if key.startswith(prefix))
        found = component_places(component, file, keys)
        places |= {path: Place(file, prefix + place.key) for path, place in found.items()}
    for prefix, (component, unused) in OPENCLIP.items():
        inner = {key.removeprefix(prefix): shapes[key] for key in shapes if key.startswith(prefix)}
        places |= dict(_openclip(component, prefix, file, inner, unused))
    return places


def _parameter(module: str, kind: str) -> str:
    return module if kind == "weight" else f"{module}.{kind}"


def _unet(plan: UNetPlan) -> Iterator[tuple[str, str]]:
    """(path, original name) of each parameter of the UNet."""
    for module, name in original_unet(f"unet.{path}" for path, _ in unet_modules(plan)).items():
        yield module, f"{name}.weight"
        if has_bias(module):
            yield f"{module}.bias", f"{name}.bias"


def _plan(shapes: Shapes) -> UNetPlan | None:
    """How a UNet with these tensors under its original names is built; None for what is no UNet of Stable Diffusion.

    In the down path each resnet has a number, with its attention beside it, and so has each downsampler between
    blocks.
    """
    blocks: list[list[int]] = [[]]
    for number in count(1):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            blocks.append([])
        elif f"input_blocks.{number}.0.in_layers.2.weight" in shapes:
            blocks[-1].append(number)
        else:
            break
    context = next((shape for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), None)
    projection = next((shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")), None)
    if not all(blocks) or not context or not projection or "input_blocks.0.0.weight" not in shapes:
        return None
    return UNetPlan(
        block_out_channels=tuple(shapes[f"input_blocks.{first}.0.in_layers.2.weight"][0] for first, *_ in blocks),
        transformer_layers=tuple(_depth(f"input_blocks.{first}.1", shapes) for first, *_ in blocks),
        cross_attention_dim=context[-1],
        use_linear_projection=len(projection) == 2,
        layers_per_block=len(blocks[0]),
        channels=shapes["input_blocks.0.0.weight"][1],
        added_embedding=shapes.get("label_emb.0.0.weight", (0, 0))[1],
    )


def _depth(attention: str, shapes: Shapes) -> int:
    return next(k for k in count() if f"{attention}.transformer_blocks.{k}.attn1.to_q.weight" not in shapes)


def _openclip(component: str, prefix: str, file: Path, shapes: Shapes, unused: int) -> Iterator[tuple[str, Place]]:
    """The parameters of an OpenCLIP text encoder; the last `unused` layers and their projection are no part of it."""
    block = "transformer.resblocks"
    layers = next(i for i in count() if f"{block}.{i}.attn.in_proj_weight" not in shapes) - unused
    if layers < 1:
        return
    model = f"{component}.text_model"
    yield f"{model}.embeddings.token_embedding", Place(file, f"{prefix}token_embedding.weight")
    yield f"{model}.embeddings.position_embedding", Place(file, f"{prefix}positional_embedding")
    for i in range(layers):
        layer, there = f"{model}.encoder.layers.{i}", f"{block}.{i}"
        width = shapes[f"{there}.attn.in_proj_weight"][1]
        for kind in ("weight", "bias"):
            for inner, name in _LAYER.items():
                yield _parameter(f"{layer}.{inner}", kind), Place(file, f"{prefix}{there}.{name}.{kind}")
            for j, inner in enumerate(_FUSED):
                rows = (j * width, (j + 1) * width)
                path = _parameter(f"{layer}.self_attn.{inner}", kind)
                yield path, Place(file, f"{prefix}{there}.attn.in_proj_{kind}", rows)
    for kind in ("weight", "bias"):
        yield _parameter(f"{model}.final_layer_norm", kind), Place(file, f"{prefix}ln_final.{kind}")
    if not unused:
        yield f"{component}.text_projection", Place(file, f"{prefix}text_projection", transposed=True)
