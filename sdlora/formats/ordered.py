"""Ordered lists (2022): pairs that a file numbers instead of naming, placed by a frozen order and checked by shape.

lora_diffusion writes `unet:0:up`, `unet:0:down`, `unet:1:up`, ... in the order in which it meets the Linear and Conv2d
layers inside modules of the classes that the metadata lists. That order is diffusers' order of children at the time:
- blocks: down, up, mid, for the middle is built last; in a block attentions come before resnets;
- a transformer block up to diffusers 0.14: attn1, ff, attn2; since 0.15 (April 2023): attn1, attn2, ff;
- an attention: to_q, to_k, to_v, to_out; a resnet: conv1, time_emb_proj, conv2, conv_shortcut;
- CLIP's attention (transformers): k_proj, v_proj, q_proj, out_proj.
The two orders differ in where the wide layer of ff stands, so that no file with ff fits both; without ff they are one.
Read in lora_diffusion/lora.py (save_safeloras_with_embeds, _find_modules_v2) and in diffusers 0.9 to 0.27, and run
with the UNets of 0.11, 0.14, 0.15 and 0.20.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, matches, times

PAIR = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,4}):(up|down)")
TOKEN = "<embed>"  # what the metadata says of a key that is a learned token
LONGEST = 1000  # characters of a list of classes

# The parts of a path that are inside a module of this class. Attention is what CrossAttention was called later.
CLASSES = {
    "CrossAttention": (".attn1.", ".attn2."),
    "Attention": (".attn1.", ".attn2."),
    "GEGLU": (".ff.net.0.",),
    "ResnetBlock2D": (".resnets.",),
    "CLIPAttention": (".self_attn.",),
}
# Brothers in the order in which they were registered; a name that is not here has none that counts.
BROTHERS = (
    ("down_blocks", "up_blocks", "mid_block"),
    ("attentions", "resnets"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    ("k_proj", "v_proj", "q_proj", "out_proj"),
)
TRANSFORMER_BLOCK = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))

Pair = tuple[Shape, Shape]  # of up and of down


@dataclass(frozen=True)
class Ordered:
    """Where the tensors of an ordered list belong.

    pairs: by module path, led by its component, the keys of up (out, rank[, 1, 1]) and down (rank, in[, kh, kw]). The
    delta is up @ down: there is no alpha, the scale is 1. tokens: by learned token the key of its vector (width,).
    """

    pairs: Mapping[str, tuple[str, str]]
    tokens: Mapping[str, str]


def is_ordered(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is an ordered list."""
    return any(":" in key and PAIR.fullmatch(key) for key in keys)


def ordered_names(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], architecture_shapes: Mapping[str, Shape]
) -> Ordered:
    """The module path of each pair in an ordered list, and its learned tokens; other keys are not in the answer.

    shapes: of the file's tensors by key. architecture_shapes: of the model's weights by path.
    SdloraError where a half or a number is missing, the classes are unknown, the count is another, or a pair does not
    fit at its place. What the metadata says about ranks is not believed: converted files say 4 whatever they hold.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for component, keys in _numbered(shapes).items():
        sizes = [(shapes[up], shapes[down]) for up, down in keys]
        paths = _places(component, sizes, _classes(component, metadata), architecture_shapes)
        pairs |= zip(paths, keys, strict=True)
    tokens = {key: key for key, value in metadata.items() if value == TOKEN and key in shapes}
    return Ordered(pairs, tokens)


def _numbered(keys: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """By component the keys (up, down) of its pairs, 0 first."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for key in keys:
        if match := PAIR.fullmatch(key):
            component, number, half = match.groups()
            found.setdefault(component, {}).setdefault(int(number), {})[half] = key
    pairs: dict[str, list[tuple[str, str]]] = {}
    for component, halves in found.items():
        for number in range(max(halves) + 1):
            for half in ("up", "down"):
                if half not in halves.get(number, {}):
                    raise SdloraError(f"{component}:{number}:{half} is missing, and an ordered list needs every number")
        pairs[component] = [(halves[number]["up"], halves[number]["down"]) for number in sorted(halves)]
    return pairs


def _classes(component: str, metadata: Mapping[str, str]) -> list[str]:
    """The classes of modules whose layers the pairs of a component change."""
    text = metadata.get(component)
    if text is None:
        raise SdloraError(
            f"{component}: an ordered list, whose metadata does not say for which classes of modules; "
            "take the file as it was before its metadata was dropped"
        )
    try:
        classes = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise SdloraError(f"{component}: the metadata of an ordered list must be a JSON list of classes of modules")
    if unknown := sorted(set(classes) - set(CLASSES)):
        raise SdloraError(
            f"{component}: the order under {', '.join(unknown)} is not known; it is for {', '.join(CLASSES)}"
        )
    return sorted(set(classes))


def _places(
    component: str, sizes: Sequence[Pair], classes: Sequence[str], architecture: Mapping[str, Shape]
) -> list[str]:
    """The paths of one component that pairs of these sizes fit, one by one, in one of the orders that there were."""
    inside = [part for name in classes for part in CLASSES[name]]
    paths = [path for path in architecture if path.startswith(f"{component}.") and any(part in path for part in inside)]
    linear = [path for path in paths if len(architecture[path]) == 2]
    # Training without the convolutions of the resnets was possible too; the count tells.
    wanted = next((some for some in (paths, linear) if len(some) == len(sizes)), None)
    if wanted is None:
        raise SdloraError(
            f"{component}: an ordered list of {len(sizes)} pairs, where {', '.join(classes)} have {len(paths)} places"
        )
    orders = [_in_order(wanted, block) for block in TRANSFORMER_BLOCK]
    fitting = [_fitting(order, sizes, architecture) for order in orders]
    place = max(fitting)
    order = orders[fitting.index(place)]
    if place == len(sizes):
        return order
    up, down = map(times, sizes[place])
    raise SdloraError(
        f"{component}:{place} (up {up}, down {down}) does not fit "
        f"{order[place]} ({times(architecture[order[place]])}), which is its place in the order"
    )


def _in_order(paths: Iterable[str], block: Sequence[str]) -> list[str]:
    """Paths as lora_diffusion met them; block: the order of a transformer block's children."""
    ranks = {name: rank for brothers in (*BROTHERS, block) for rank, name in enumerate(brothers)}
    return sorted(
        paths, key=lambda path: [int(part) if part.isdigit() else ranks.get(part, 0) for part in path.split(".")]
    )


def _fitting(order: Sequence[str], sizes: Sequence[Pair], architecture: Mapping[str, Shape]) -> int:
    """How many pairs fit at their places before the first that does not."""
    misfits = (at for at, path in enumerate(order) if not _fit(*sizes[at], architecture[path]))
    return next(misfits, len(order))


def _fit(up: Shape, down: Shape, wanted: Shape) -> bool:
    """Whether up @ down is a change to a weight of the shape `wanted`."""
    if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or any(size != 1 for size in up[2:]):
        return False
    return matches((up[0], *down[1:]), wanted)
