"""Pictures as training sees them: upright, RGB, on white, cut to their bucket."""

import hashlib
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdlora.errors import SdloraError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif")


def load(path: Path) -> Image.Image:
    """The picture turned as its EXIF says, transparency on white, in RGB; SdloraError where it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
            return _on_white(_eight_bits(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:  # pillow's decoders
        raise SdloraError(f"{path} cannot be read as a picture ({_reason(error)})") from error


def content_hash(path: Path) -> str:
    """SHA-256 of the file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cover(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The factor that makes a picture of `size` just cover the bucket (width, height); above 1 it is upscaled."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def fit(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """Scaled without squashing until it covers the bucket (width, height), then cut to it around the middle."""
    return ImageOps.fit(image, bucket, method=Image.Resampling.LANCZOS)


def placement(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int, int, int, int, int]:
    """How `fit` cuts: original height and width, top and left of the cut after scaling, height and width of the bucket.

    SDXL is told these six numbers (arXiv:2307.01952, section 2.2).
    """
    factor = cover(size, bucket)
    left, top = (round((side * factor - cut) / 2) for side, cut in zip(size, bucket, strict=True))
    return size[1], size[0], top, left, bucket[1], bucket[0]


def pixels(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1], float32, which is what the VAE takes."""
    values_hwc = torch.from_numpy(numpy.array(image, dtype=numpy.uint8))
    return values_hwc.permute(2, 0, 1).float() / 127.5 - 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits (PNG) scaled to 8; pillow's own conversion would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((numpy.asarray(image).clip(0, 65535) / 257).round().astype(numpy.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _reason(error: Exception) -> str:
    """Pillow's words on one line, without the path, which the message names already."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "no picture in it" if text.startswith("cannot identify image file") else text
