"""The blocks of Stable Diffusion's family, by which people weigh a LoRA.

The names are those of block-weighted merging, and the UI extension sd-webui-lora-block-weight ("lbw") has them too:
IN00 to IN11 are the original code's input_blocks, M00 its middle_block, OUT00 to OUT11 its output_blocks.
"""

import re

BLOCKS = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))

_LAYER = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.|$)")


def block_of(path: str) -> str:
    """The block of a module or parameter (`.bias` allowed), by its diffusers path.

    Three numbers to a level, as in the original code: on the way down two layers and the downsampler, on the way up
    three layers, the upsampler with the last. So conv_in is IN00; down_blocks.i.{resnets,attentions}.j is
    IN(3i + j + 1), its downsampler IN(3i + 3); up_blocks.i.{resnets,attentions}.j is OUT(3i + j), its upsampler
    OUT(3i + 2). A level with fewer layers (toybox) keeps these numbers and leaves some out.
    What lies in no block is BASE: the text encoders, the time and label embeddings, conv_norm_out and conv_out.
    """
    if path.startswith("unet.mid_block."):
        return "M00"
    if path.startswith("unet.conv_in"):
        return "IN00"
    layer = _LAYER.match(path)
    if not layer:
        return "BASE"
    side, level, kind, place = layer.groups()
    inside = 2 if kind in ("downsamplers", "upsamplers") else min(int(place), 2)
    number = 3 * int(level) + inside
    name = f"IN{number + 1:02}" if side == "down" else f"OUT{number:02}"
    return name if name in BLOCKS else "BASE"
