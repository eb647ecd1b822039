"""How LoRA files spell the paths of modules.

Each path is spelled forward in every naming; files are read by the inverse dictionary, key by key, never by taking
names apart: "to_out_0" and "down_blocks" cannot be told into dots without knowing the model.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import count

NAMINGS = ("kohya", "diffusers")

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def kohya(paths: Iterable[str], two_encoders: bool = False) -> dict[str, str]:
    """kohya's name of each path: dots become underscores, the component a prefix.

    two_encoders: the model has two text encoders even if the paths name only the first.
    """
    paths = tuple(paths)
    two = two_encoders or any(path.startswith("text_encoder_2.") for path in paths)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    return {path: _flat(prefixes, path) for path in paths}


def readable(paths: Iterable[str]) -> dict[str, str]:
    """Every name that a file may have for the paths, and the path it stands for.

    kohya's names, with diffusers' blocks or with those of the original code (sd-scripts trains SDXL so), and
    diffusers' names, with and without the level text_model, which transformers 5 has dropped.
    """
    paths = tuple(paths)
    original = {f"unet.{name}": path for name, path in _original_unet(paths)}
    names = {path: path for path in paths}
    names |= {path.replace(".text_model.", ".", 1): path for path in paths}
    for text_encoder in ("lora_te", "lora_te1"):  # either is found on models with one text encoder, and with two
        prefixes = {"unet": "lora_unet", "text_encoder": text_encoder, "text_encoder_2": "lora_te2"}
        names |= {_flat(prefixes, name): path for name, path in (names | original).items() if "." in name}
    return names


def _flat(prefixes: dict[str, str], path: str) -> str:
    component, _, inner = path.partition(".")
    return f"{prefixes[component]}_{inner.replace('.', '_')}"


def _original_unet(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, path) for each module of the UNet, with the names of the original code (ldm, sgm)."""
    inner = [path.removeprefix("unet.") for path in paths if path.startswith("unet.")]
    names = _ENDS | dict(_original_blocks(inner))
    for path in inner:
        parts = path.split(".")
        depth = 3 if parts[0] == "mid_block" else 4
        block, leaf = ".".join(parts[:depth]), ".".join(parts[depth:])
        if path in names:
            yield names[path], f"unet.{path}"
        elif block in names:
            yield f"{names[block]}.{_RESNET.get(leaf, leaf)}", f"unet.{path}"


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
