"""The blocks by which sizes are told: those of the UNet that people weigh, and each text encoder as one."""

from sdlora.formats.block_weights import BLOCKS, block_of


def block_or_encoder(path: str) -> str:
    """Where a parameter belongs: the name of its block (see `block_of`), or of its text encoder."""
    component = path.partition(".")[0]
    return block_of(path) if component == "unet" else component


def place(name: str) -> tuple[int, str]:
    """To sort by: blocks in the order of BLOCKS, or the UNet as a whole, then text encoders."""
    return (BLOCKS.index(name) if name in BLOCKS else len(BLOCKS) + (name != "unet")), name
