"""Toybox's world: flat vector scenes of one subject in one place, drawn by pillow at twice the size and halved.

A `Scene` says everything about a picture, `draw` renders it (about 1 ms), `caption` puts it into words.
Shapes are drawn through a `Pen`, which knows the style: the same scene comes out flat, in ink or as a blueprint.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tools.toybox import places, subjects

SIZE = 128
SUPERSAMPLE = 2

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (216, 46, 46),
    "orange": (243, 130, 28),
    "yellow": (251, 208, 44),
    "green": (44, 142, 62),
    "blue": (40, 92, 214),
    "purple": (124, 58, 178),
    "pink": (246, 138, 184),
    "brown": (122, 76, 42),
    "white": (248, 248, 244),
    "black": (40, 40, 46),
}
SUBJECTS = tuple(subjects.DRAW)[:10]  # the eleventh, the zib, is the sample character that the base never sees
PLACES = tuple(places.DRAW)

# One (subject, colour) pair in ten is never shown in training: what the base makes of it is composition, not memory.
HELD_OUT = frozenset((subject, tuple(COLOURS)[(3 * i + 1) % 10]) for i, subject in enumerate(SUBJECTS))


@dataclass(frozen=True)
class Style:
    """How a pen fills and outlines. `paper` None: coloured fills; `ink` None: outlines in a shade of the fill."""

    words: tuple[str, ...] = ()
    paper: Colour | None = None
    ink: Colour | None = None
    width: float = 1.6
    keep_subject_colour: bool = True
    grid: Colour | None = None


STYLES: dict[str, Style] = {
    "flat": Style(),
    "ink": Style(("an ink drawing of", "ink drawing,"), (247, 241, 226), (38, 34, 40), 1.5),
    "chalk": Style(("a chalk drawing of", "chalk drawing,"), (44, 62, 56), (222, 226, 214), 1.9, False),
    "crayon": Style(("a crayon drawing of", "crayon drawing,"), None, (52, 44, 70), 2.6),
    "blueprint": Style(("a blueprint of", "blueprint,"), (28, 72, 158), (238, 244, 255), 1.5, False, (62, 108, 190)),
}
BASE_STYLES = ("flat", "ink", "chalk", "crayon")  # blueprint is the sample style that the base never sees


@dataclass(frozen=True)
class Scene:
    """One picture: what is drawn, where, how large, and the seed of the background's details."""

    subject: str
    colour: str
    place: str
    style: str = "flat"
    size: float = 0.5  # half height of the subject as a share of half the picture
    x: float = 0.0  # middle of the subject, -1 .. 1
    y: float = 0.25
    flip: bool = False
    seed: int = 0


def shade(colour: Colour, factor: float) -> Colour:
    """Darker for factor < 1; for factor > 1 the same share of the way to white."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws shapes given in local coordinates (-1 .. 1) at a position, size and style."""

    def __init__(self, canvas: ImageDraw.ImageDraw, style: Style, x: float, y: float, size: float, flip: bool = False):
        half = SIZE * SUPERSAMPLE / 2
        self.canvas, self.style = canvas, style
        self.x, self.y, self.scale = half + x * half, half + y * half, size * half
        self.flip = -1 if flip else 1
        self.line_width = round(style.width * SUPERSAMPLE)
        self.subject = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + self.flip * x * self.scale, self.y + y * self.scale

    def fill(self, colour: Colour) -> Colour:
        if self.style.paper is None or (self.subject and self.style.keep_subject_colour):
            return colour
        return self.style.paper

    def outline(self, colour: Colour) -> Colour | None:
        if self.style.ink is not None:
            return self.style.ink
        if not self.subject:
            return None
        return shade(colour, 1.35) if sum(colour) < 150 else shade(colour, 0.55)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        corners = [self.at(*point) for point in points]
        outline = self.outline(colour)
        self.canvas.polygon(corners, fill=self.fill(colour))
        if outline:
            self.canvas.line([*corners, corners[0], corners[1]], fill=outline, width=self.line_width, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        (cx, cy), ax, ay = self.at(x, y), abs(rx * self.scale), abs(ry * self.scale)
        box = (cx - ax, cy - ay, cx + ax, cy + ay)
        self.canvas.ellipse(box, self.fill(colour), self.outline(colour), self.line_width)

    def circle(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.ellipse(x, y, radius, radius, colour)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0.0) -> None:
        (ax, ay), (bx, by) = self.at(x0, y0), self.at(x1, y1)
        box = (min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
        outline = self.outline(colour)
        self.canvas.rounded_rectangle(box, radius * self.scale, self.fill(colour), outline, self.line_width)

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float = 0.06) -> None:
        """A stroke; `width` in local units, but never thinner than the pen."""
        thick = max(round(width * self.scale), self.line_width)
        ink = self.style.ink if self.style.ink is not None and self.style.paper is not None else colour
        self.canvas.line([self.at(*point) for point in points], fill=ink, width=thick, joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A small solid spot without outline: pupils, stars, buttons. In a line style it is ink."""
        (cx, cy), r = self.at(x, y), max(radius * self.scale, 1.6)
        ink = self.style.ink if self.style.ink is not None and self.style.paper is not None else colour
        self.canvas.ellipse((cx - r, cy - r, cx + r, cy + r), fill=ink)

    def eye(self, x: float, y: float, radius: float) -> None:
        """White, with a pupil. In line styles the white is the paper."""
        (cx, cy), r = self.at(x, y), radius * self.scale
        line_style = self.style.paper is not None
        white = self.style.paper if line_style else (255, 255, 255)
        dark = self.style.ink if line_style else (24, 22, 30)
        self.canvas.ellipse((cx - r, cy - r, cx + r, cy + r), white, dark, max(1, self.line_width // 2))
        self.canvas.ellipse((cx - r * 0.55, cy - r * 0.55, cx + r * 0.55, cy + r * 0.55), dark)


def draw(scene: Scene, style: Style | None = None) -> Image.Image:
    """The scene as an RGB picture of 128 x 128 pixels, in its own style unless another is given."""
    style = style or STYLES[scene.style]
    full = SIZE * SUPERSAMPLE
    picture = Image.new("RGB", (full, full), style.paper or (255, 255, 255))
    canvas = ImageDraw.Draw(picture)
    places.DRAW[scene.place](Pen(canvas, style, 0, 0, 1), random.Random(scene.seed))
    if style.grid:
        for line in range(8 * SUPERSAMPLE, full, 16 * SUPERSAMPLE):
            canvas.line((line, 0, line, full), style.grid, SUPERSAMPLE)
            canvas.line((0, line, full, line), style.grid, SUPERSAMPLE)
    pen = Pen(canvas, style, scene.x, scene.y, scene.size, scene.flip)
    pen.subject = True
    subjects.DRAW[scene.subject](pen, COLOURS[scene.colour])
    return picture.reduce(SUPERSAMPLE)


def random_scene(rng: random.Random, **fixed: object) -> Scene:
    """A scene drawn uniformly over subjects, colours and places, never a held-out pair unless `fixed` asks for it."""
    values: dict[str, object] = {
        "subject": rng.choice(SUBJECTS),
        "colour": rng.choice(tuple(COLOURS)),
        "place": rng.choice(PLACES),
        "size": rng.uniform(0.42, 0.68),
        "flip": rng.random() < 0.5,
        "seed": rng.getrandbits(32),
    }
    values |= fixed
    if "colour" not in fixed and (values["subject"], values["colour"]) in HELD_OUT:
        return random_scene(rng, **fixed)
    size = float(values["size"])  # type: ignore[arg-type]
    values.setdefault("x", rng.uniform(-0.85, 0.85) * (1 - size))
    values.setdefault("y", rng.uniform(0.15, 0.85) * (1 - size))
    return Scene(**values)  # type: ignore[arg-type]


def caption(scene: Scene, rng: random.Random) -> str:
    """The scene in words, with some variation of wording and order."""
    words = STYLES[scene.style].words
    size = (
        "small "
        if scene.size < 0.48 and rng.random() < 0.4
        else "big "
        if scene.size > 0.62 and rng.random() < 0.4
        else ""
    )
    colour = f"{scene.colour} " if STYLES[scene.style].keep_subject_colour else ""
    thing = f"{size}{colour}{scene.subject}"
    article = "an" if thing[0] in "aeiou" else "a"
    place = rng.choice(places.WORDS[scene.place])
    if words:
        return f"{rng.choice(words)} {article} {thing} {place}"
    return rng.choice(
        (
            f"{article} {thing} {place}",
            f"{article} {thing} {place}",
            f"{article} {thing} {place}",
            f"a picture of {article} {thing} {place}",
            f"{thing}, {place}",
            f"{place}, {article} {thing}",
            f"{article} {size}{scene.subject} that is {scene.colour}, {place}",
        )
    )


def contact_sheet(pictures: list[Image.Image], columns: int = 8, gap: int = 4) -> Image.Image:
    """Pictures of one size side by side, for looking at."""
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + (i % columns) * (width + gap), gap + (i // columns) * (height + gap)))
    return sheet
