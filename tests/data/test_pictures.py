"""Pictures as tensors: upright, on white, covering their bucket without squashing."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from sdlora.data import pictures


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 127))
    image.save(tmp_path / "a.png")
    loaded = pictures.load(tmp_path / "a.png")
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == pytest.approx((228, 128, 128), abs=1)


def test_transparency_of_a_palette_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "a.png", transparency=0)
    assert pictures.load(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 128), ("CMYK", (0, 127, 127, 0)), ("1", 1), ("LA", (128, 255))])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: object) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4), colour).save(path)  # pyright: ignore[reportArgumentType]
    assert pictures.load(path).mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(numpy.full((2, 2), 32768, numpy.uint16)).save(tmp_path / "a.png")
    assert pictures.load(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_exif_rotation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 8  # the camera was turned: to see it upright, turn the file's picture by 90 degrees to the left
    image.save(tmp_path / "a.png", exif=exif)
    loaded = pictures.load(tmp_path / "a.png")
    assert loaded.size == (8, 16)
    assert (loaded.getpixel((4, 2)), loaded.getpixel((4, 13))) == ((255, 255, 255), (0, 0, 0))


def test_fit_cuts_the_middle_and_never_squashes() -> None:
    values = numpy.zeros((64, 192, 3), numpy.uint8)
    values[:, 64:128] = 255
    fitted = pictures.fit(Image.fromarray(values), (32, 32))
    assert fitted.size == (32, 32)
    assert numpy.asarray(fitted).min() > 230
    assert pictures.cover((192, 64), (32, 32)) == 0.5
    assert pictures.cover((16, 64), (32, 32)) == 2.0


def test_pixels_are_channels_first_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 0))
    assert torch.equal(pictures.pixels(image), torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1).expand(3, 2, 3))
