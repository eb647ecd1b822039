"""The modules of Stable Diffusion models by path and shape, listed in plain Python: no model needs to be loaded."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from sdlora import toybox as toybox_model

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
Module = tuple[str, tuple[int, ...]]

# Convolutions by which an inpainting model differs from the one it was made of.
ENDS = ("unet.conv_in", "unet.conv_out")
LABELS = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "toybox": "toybox", "custom": "of another kind"}
# Linear layers of these names have no bias; all other Linear and Conv2d modules have one.
WITHOUT_BIAS = (".to_q", ".to_k", ".to_v", ".text_projection")


@dataclass(frozen=True, eq=False)
class Architecture:
    """What a LoRA can change in a model.

    name: sd1, sd2, sdxl, toybox, or custom for any other.
    shapes: of each Linear's and Conv2d's weight by its path; norms: (width,) of each GroupNorm and LayerNorm.
    """

    name: str
    shapes: Shapes
    norms: Shapes = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name as people write it."""
        return LABELS[self.name]

    def shape_of(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a module's weight by its path, of its bias by the path and ".bias"; None for what is not there.

        A module that has no bias could be given one, so it has a shape too.
        """
        module = parameter.removesuffix(".bias")
        shape = self.shapes.get(module) or self.norms.get(module)
        return shape[:1] if shape and module != parameter else shape

    @property
    def components(self) -> tuple[str, ...]:
        """What a LoRA can change: "unet", "text_encoder" and so on, in the model's order."""
        return tuple(dict.fromkeys(path.partition(".")[0] for path in self.shapes))


@dataclass(frozen=True)
class UNetPlan:
    """The numbers that tell Stable Diffusion's UNets apart, in the words of diffusers' config.

    transformer_layers: per down block; 0 is a block without attention.
    """

    block_out_channels: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    cross_attention_dim: int
    use_linear_projection: bool
    layers_per_block: int = 2
    channels: int = 4
    added_embedding: int = 0  # width of SDXL's size and pooled-text embedding


@dataclass(frozen=True)
class TextEncoderPlan:
    """A CLIP text encoder; projection: whether it is the kind that ends in a text projection."""

    hidden_size: int
    layers: int
    projection: bool = False


@cache
def sd1() -> Architecture:
    unet = UNetPlan((320, 640, 1280, 1280), (1, 1, 1, 0), 768, False)
    return _architecture("sd1", unet, text_encoder=TextEncoderPlan(768, 12))


@cache
def sd2() -> Architecture:
    unet = UNetPlan((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, True)
    return _architecture("sd2", unet, text_encoder=TextEncoderPlan(1024, 23))


@cache
def sdxl() -> Architecture:
    unet = UNetPlan((320, 640, 1280), (0, 2, 10), 2048, True, added_embedding=2816)
    encoders = {"text_encoder": TextEncoderPlan(768, 12), "text_encoder_2": TextEncoderPlan(1280, 32, True)}
    return _architecture("sdxl", unet, **encoders)


@cache
def toybox() -> Architecture:
    """The small model that ships with sdlora, as its own configs describe it."""
    unet, encoder = (_config(part) for part in ("unet", "text_encoder"))
    widths = tuple(unet["block_out_channels"])
    depths = tuple(int("CrossAttn" in block) for block in unet["down_block_types"])
    plan = UNetPlan(
        widths,
        depths,
        unet["cross_attention_dim"],
        unet["use_linear_projection"],
        layers_per_block=unet["layers_per_block"],
        channels=unet["in_channels"],
    )
    text_encoder = TextEncoderPlan(encoder["hidden_size"], encoder["num_hidden_layers"])
    return _architecture("toybox", plan, text_encoder=text_encoder)


@cache
def known() -> tuple[Architecture, ...]:
    """The architectures that files are recognised as."""
    return sd1(), sd2(), sdxl(), toybox()


def architecture_of(components: Mapping[str, "nn.Module"]) -> Architecture:
    """The architecture of a model at hand.

    The convolutions at both ends do not count for the name: inpainting models have more channels there.
    """
    from torch import nn

    from sdlora.lowrank.targets import modules_of, shape_of

    shapes = {path: shape_of(module, "weight") for path, module in modules_of(components).items()}
    norms = modules_of(components, kinds=(nn.GroupNorm, nn.LayerNorm))
    widths = {path: tuple(module.weight.shape) for path, module in norms.items()}
    same = next((one for one in known() if _inner(one.shapes) == _inner(shapes)), None)
    if same and (same.shapes, same.norms) == (shapes, widths):
        return same  # itself, since names are remembered by architecture
    return Architecture(same.name if same else "custom", shapes, widths)


def has_bias(module: str) -> bool:
    """Whether a Linear or Conv2d of this path has a bias in the models as they were released."""
    return not module.endswith(WITHOUT_BIAS)


def _config(part: str) -> dict[str, Any]:
    return json.loads((toybox_model.path() / part / "config.json").read_text("utf-8"))


def _inner(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {path: shape for path, shape in shapes.items() if path not in ENDS}


def _architecture(name: str, unet: UNetPlan, **text_encoders: TextEncoderPlan) -> Architecture:
    modules = {f"unet.{path}": shape for path, shape in unet_modules(unet)}
    for component, plan in text_encoders.items():
        modules |= {f"{component}.{path}": shape for path, shape in _text_encoder(plan)}
    shapes = {path: shape for path, shape in modules.items() if len(shape) > 1}
    return Architecture(name, shapes, {path: shape for path, shape in modules.items() if len(shape) == 1})


def unet_modules(plan: UNetPlan) -> Iterator[Module]:
    """(path within the UNet, shape of the weight) of each module that has one, in the model's order."""
    widths, layers = plan.block_out_channels, plan.layers_per_block
    first, last, time = widths[0], widths[-1], 4 * widths[0]
    yield "conv_in", (first, plan.channels, 3, 3)
    yield from _embedding("time_embedding", first, time)
    if plan.added_embedding:
        yield from _embedding("add_embedding", plan.added_embedding, time)
    for i, (width, depth) in enumerate(zip(widths, plan.transformer_layers, strict=True)):
        block = f"down_blocks.{i}"
        for j in range(layers):
            into = widths[max(i - 1, 0)] if j == 0 else width
            yield from _resnet(f"{block}.resnets.{j}", into, width, time)
            yield from _transformer(f"{block}.attentions.{j}", width, depth, plan)
        if i < len(widths) - 1:
            yield f"{block}.downsamplers.0.conv", (width, width, 3, 3)
    yield from _resnet("mid_block.resnets.0", last, last, time)
    # A block without attention may close the UNet; its middle then has as much as the block before.
    middle = next(depth for depth in reversed(plan.transformer_layers) if depth)
    yield from _transformer("mid_block.attentions.0", last, middle, plan)
    yield from _resnet("mid_block.resnets.1", last, last, time)
    yield from _up_blocks(plan, time)
    yield "conv_norm_out", (first,)
    yield "conv_out", (plan.channels, first, 3, 3)


def _up_blocks(plan: UNetPlan, time: int) -> Iterator[Module]:
    """The up blocks mirror the down blocks, with one layer more; each layer also takes in what was skipped."""
    widths, depths = plan.block_out_channels[::-1], plan.transformer_layers[::-1]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        block = f"up_blocks.{i}"
        for j in range(plan.layers_per_block + 1):
            into = widths[max(i - 1, 0)] if j == 0 else width
            skipped = widths[min(i + 1, len(widths) - 1)] if j == plan.layers_per_block else width
            yield from _resnet(f"{block}.resnets.{j}", into + skipped, width, time)
            yield from _transformer(f"{block}.attentions.{j}", width, depth, plan)
        if i < len(widths) - 1:
            yield f"{block}.upsamplers.0.conv", (width, width, 3, 3)


def _embedding(path: str, into: int, out: int) -> Iterator[Module]:
    yield f"{path}.linear_1", (out, into)
    yield f"{path}.linear_2", (out, out)


def _resnet(path: str, into: int, out: int, time: int) -> Iterator[Module]:
    yield f"{path}.norm1", (into,)
    yield f"{path}.conv1", (out, into, 3, 3)
    yield f"{path}.time_emb_proj", (out, time)
    yield f"{path}.norm2", (out,)
    yield f"{path}.conv2", (out, out, 3, 3)
    if into != out:
        yield f"{path}.conv_shortcut", (out, into, 1, 1)


def _transformer(path: str, width: int, depth: int, plan: UNetPlan) -> Iterator[Module]:
    if not depth:
        return
    projection = (width, width) if plan.use_linear_projection else (width, width, 1, 1)
    yield f"{path}.norm", (width,)
    yield f"{path}.proj_in", projection
    for k in range(depth):
        block = f"{path}.transformer_blocks.{k}"
        for norm in ("norm1", "norm2", "norm3"):
            yield f"{block}.{norm}", (width,)
        for attention, seen in (("attn1", width), ("attn2", plan.cross_attention_dim)):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, seen)
            yield f"{block}.{attention}.to_v", (width, seen)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{path}.proj_out", projection


def _text_encoder(plan: TextEncoderPlan) -> Iterator[Module]:
    width = plan.hidden_size
    for i in range(plan.layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("k", "v", "q", "out"):
            yield f"{layer}.self_attn.{name}_proj", (width, width)
        yield f"{layer}.layer_norm1", (width,)
        yield f"{layer}.mlp.fc1", (4 * width, width)
        yield f"{layer}.mlp.fc2", (width, 4 * width)
        yield f"{layer}.layer_norm2", (width,)
    yield "text_model.final_layer_norm", (width,)
    if plan.projection:
        yield "text_projection", (width, width)
