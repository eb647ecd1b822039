"""Sheets: pictures side by side, each under its label, in rows with a title."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdlora.formats.sources import name_of
from sdlora.generation.job import Job

GAP, HEAD = 6, 22  # pixels between pictures, and of a line of text
LARGEST = 512  # pixels of a picture's longer side; larger ones are shrunk

Cell = tuple[str, Image.Image]


def sheet(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A line with the title of a row, then its pictures under their labels, row by row. Pictures are of one size."""
    shown = [(title, [(label, _fitting(image)) for label, image in cells]) for title, cells in rows]
    width, height = shown[0][1][0][1].size
    widest = max(len(cells) for _, cells in shown)
    drop = 2 * HEAD + height + GAP
    made = Image.new("RGB", (GAP + widest * (width + GAP), GAP + len(shown) * drop), "white")
    draw, bold, plain = ImageDraw.Draw(made), ImageFont.load_default(14), ImageFont.load_default(11)
    for i, (title, cells) in enumerate(shown):
        top = GAP + i * drop
        draw.text((GAP, top + 3), title, "black", bold)
        for j, (label, image) in enumerate(cells):
            left = GAP + j * (width + GAP)
            draw.text((left, top + HEAD + 4), label, "dimgray", plain)
            made.paste(image, (left, top + 2 * HEAD))
    return made


def compared(pictures: Sequence[tuple[Job, Image.Image]], columns: int, first: int, second: int = -1) -> Image.Image:
    """The sheet of a ladder or grid: `columns` pictures a row, labelled with the weights of the LoRAs of these numbers.

    first: the LoRA whose weight differs from picture to picture; second: from row to row, -1 for none.
    """
    rows = []
    for start in range(0, len(pictures), columns):
        row = pictures[start : start + columns]
        title = row[0][0].prompt if second < 0 else _weight(row[0][0], second)
        rows.append((title, [(_weight(job, first), image) for job, image in row]))
    return sheet(rows)


def _weight(job: Job, index: int) -> str:
    lora = job.loras[index]
    return f"{name_of(Path(lora.path))[:40]} {lora.unet:g}"


def _fitting(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    return image if longest <= LARGEST else image.resize([side * LARGEST // longest for side in image.size])
