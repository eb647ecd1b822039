"""How LoRA files spell the paths of modules.

Each path is spelled forward in every naming; files are read by the inverse dictionary, key by key, never by taking
names apart: "to_out_0" and "down_blocks" cannot be told into dots without knowing the model.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count

NAMINGS = ("kohya", "diffusers", "peft", "comfyui")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
# What stands before a module's dotted name. "unet/" is no file's spelling but ours, for a file about one component.
_UNET_PREFIXES: tuple[str, ...] = ("unet.", "", "base_model.model.", "base_model.model.unet.", "diffusion_model.")
_UNET_PREFIXES += ("model.diffusion_model.", "unet/", "unet/base_model.model.")
_ENCODER_PREFIXES = {
    "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l.")
    + ("text_encoders.clip_h.transformer.", "clip_h.", "text_encoder/", "text_encoder/base_model.model."),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer.", "clip_g.")
    + ("text_encoder_2/", "text_encoder_2/base_model.model."),
}
# A name of these prefixes does not say which text encoder it means; the shapes do, or the folder that it lies in.
_ANY_ENCODER_PREFIXES = ("", "base_model.model.", "lycoris.")
# The same for names with underscores. lora_te and lora_te1 are found on models with one text encoder, and with two.
_FLAT_PREFIXES = {
    "unet": ("lora_unet_", "lycoris_", "lycoris_unet_", "oft_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_text_encoder_"),
    "text_encoder_2": ("lora_te2_", "lycoris_text_encoder_2_"),
}
_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def kohya(
    paths: Iterable[str], two_encoders: bool = False, original: Mapping[str, str] | None = None
) -> dict[str, str]:
    """kohya's name of each path: dots become underscores, the component a prefix.

    two_encoders: the model has two text encoders even if the paths name only the first. original: the names that the
    UNet's modules have in the original code (see `original_unet`), to be used in place of diffusers' names.
    """
    paths = tuple(paths)
    two = two_encoders or any(path.startswith("text_encoder_2.") for path in paths)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    known = original or {}
    return {path: prefixes[component] + _flat(known.get(path, inner)) for path, component, inner in _split(paths)}


def comfyui(paths: Iterable[str], original: Mapping[str, str], encoder: str = "clip_l") -> dict[str, str]:
    """ComfyUI's name of each path: its text encoders, and the UNet's modules as the original code calls them.

    original: see `original_unet`, of the whole model. encoder: the first one, clip_l or, in SD 2.x, clip_h.
    """
    prefixes = {"text_encoder": f"text_encoders.{encoder}.transformer."}
    prefixes["text_encoder_2"] = "text_encoders.clip_g.transformer."
    return {
        path: f"diffusion_model.{original[path]}" if component == "unet" else prefixes[component] + inner
        for path, component, inner in _split(paths)
    }


def readable(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every name that a file may have for the paths, and the paths that it can stand for: mostly one.

    paths: of all weights that a LoRA can change, norms included.
    """
    names: dict[str, list[str]] = defaultdict(list)
    paths = tuple(paths)
    original = original_unet(paths)
    for path, component, inner in _split(paths):
        if component == "unet":
            spelled = _spelled_unet(inner, original.get(path))
        else:
            spelled = _spelled_encoder(component, inner)
        for name in spelled:
            if path not in names[name]:
                names[name].append(path)
    return {name: tuple(found) for name, found in names.items()}


def component_in(name: str) -> str:
    """The component that a file's name of a module speaks of, as far as its first words tell; mostly the UNet."""
    for component in ("text_encoder_2", "text_encoder"):
        if name.startswith((*_FLAT_PREFIXES[component], *_ENCODER_PREFIXES[component])):
            return component
    return "text_encoder" if "text_model" in name else "unet"


def original_unet(paths: Iterable[str]) -> dict[str, str]:
    """The name that the original code (ldm, sgm) has for each module of the UNet; paths, of all of it, led by "unet.".

    The blocks are counted through, so that a part of the paths does not tell the names of its modules.
    """
    inner = [path.removeprefix("unet.") for path in paths if path.startswith("unet.")]
    names = _ENDS | dict(_original_blocks(inner))
    found = {}
    for path in inner:
        parts = path.split(".")
        depth = 3 if parts[0] == "mid_block" else 4
        block, leaf = ".".join(parts[:depth]), ".".join(parts[depth:])
        if path in names:
            found[f"unet.{path}"] = names[path]
        elif block in names:
            found[f"unet.{path}"] = f"{names[block]}.{_RESNET.get(leaf, leaf)}"
    return found


def _split(paths: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(path, component, path within it)."""
    for path in paths:
        component, _, inner = path.partition(".")
        yield path, component, inner


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _spelled_unet(inner: str, original: str | None) -> Iterator[str]:
    for name in (inner, original):
        if name:
            yield from (prefix + name for prefix in _UNET_PREFIXES)
            yield from (prefix + _flat(name) for prefix in _FLAT_PREFIXES["unet"])
    block, _, leaf = inner.removesuffix(".0").rpartition(".")
    if block.endswith((".attn1", ".attn2")):  # diffusers before 0.21 had processors; of to_out they dropped the number
        yield from (f"{prefix}{block}.processor.{leaf}" for prefix in _UNET_PREFIXES[:2])


def _spelled_encoder(component: str, inner: str) -> Iterator[str]:
    """With and without the level text_model, which transformers 5 has dropped."""
    for name in dict.fromkeys((inner, inner.removeprefix("text_model."))):
        yield from (prefix + name for prefix in (*_ENCODER_PREFIXES[component], *_ANY_ENCODER_PREFIXES))
        yield from (prefix + _flat(name) for prefix in (*_FLAT_PREFIXES[component], "lycoris_"))
        block, _, leaf = name.rpartition(".")
        if leaf in _OLD_ATTENTION:
            yield f"{component}.{block}.{_OLD_ATTENTION[leaf]}"
            yield f"{component}.{name}.{_OLD_ATTENTION[leaf]}"  # diffusers 0.16


def _original_blocks(inner: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, original name) of resnets, attentions and samplers, counted through as the original does.

    There the down path is one list, in which a downsampler has a number of its own; in the up path an upsampler
    follows the resnet and, where there is one, the attention under the last number of its block.
    """
    there = {".".join(path.split(".")[:4]) for path in inner}
    for i, middle in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{middle}", f"middle_block.{i}"
    number = 1
    for i, layers in enumerate(_layers("down_blocks", there)):
        for j in range(layers):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for i, layers in enumerate(_layers("up_blocks", there)):
        for j in range(layers):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        after = 2 if f"up_blocks.{i}.attentions.0" in there else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{after}.conv"


def _layers(side: str, there: Collection[str]) -> Iterator[int]:
    """The number of layers of each block, from the first on."""
    for i in count():
        layers = next(j for j in count() if f"{side}.{i}.resnets.{j}" not in there)
        if not layers:
            return
        yield layers
