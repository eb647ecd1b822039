"""The places of toybox's world, and their words. Drawn in picture coordinates (-1 .. 1, y down) by a pen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.toybox.world import Colour, Pen

WORDS = {
    "meadow": ("in a meadow", "in the meadow", "on a green meadow"),
    "beach": ("on a beach", "on the beach", "at the beach"),
    "night": ("at night", "in the night", "under the stars at night"),
    "snow": ("in the snow", "in a snowy field", "on snow"),
    "city": ("in a city", "in the city", "on a city street"),
}


def sky(pen: Pen, colour: Colour) -> None:
    if pen.style.paper is None:
        pen.canvas.rectangle((0, 0, 2 * pen.x, 2 * pen.y), fill=colour)


def ground(pen: Pen, colour: Colour, height: float, bumps: list[float]) -> None:
    """A hilly band down to the lower edge, its crest at `height` plus bumps from left to right."""
    steps = len(bumps) - 1
    crest = [(-1.1 + 2.2 * i / steps, height + bump) for i, bump in enumerate(bumps)]
    pen.polygon([*crest, (1.1, 1.1), (-1.1, 1.1)], colour)


def cloud(pen: Pen, x: float, y: float, size: float, colour: Colour) -> None:
    pen.ellipse(x, y, size, size * 0.42, colour)
    pen.ellipse(x + size * 0.3, y - size * 0.28, size * 0.55, size * 0.42, colour)


def meadow(pen: Pen, rng: random.Random) -> None:
    sky(pen, (158, 212, 244))
    pen.circle(rng.choice((-1, 1)) * rng.uniform(0.5, 0.8), rng.uniform(-0.8, -0.6), 0.16, (255, 226, 110))
    cloud(pen, rng.uniform(-0.5, 0.5), rng.uniform(-0.8, -0.45), rng.uniform(0.16, 0.26), (250, 253, 255))
    far = rng.uniform(-0.25, 0.05)
    ground(pen, (150, 204, 112), far, [rng.uniform(-0.12, 0.12) for _ in range(4)])
    ground(pen, (124, 188, 92), far + 0.32, [rng.uniform(-0.05, 0.05) for _ in range(4)])
    for _ in range(7):
        petal = rng.choice(((255, 255, 255), (255, 214, 90), (250, 150, 180)))
        pen.dot(rng.uniform(-0.95, 0.95), rng.uniform(far + 0.5, 0.95), 0.022, petal)


def beach(pen: Pen, rng: random.Random) -> None:
    sky(pen, (186, 232, 250))
    pen.circle(rng.choice((-1, 1)) * rng.uniform(0.4, 0.8), rng.uniform(-0.8, -0.6), 0.17, (255, 206, 84))
    sea = rng.uniform(-0.3, -0.1)
    pen.polygon([(-1.1, sea), (1.1, sea), (1.1, 1.1), (-1.1, 1.1)], (58, 160, 208))
    for _ in range(3):
        x, y = rng.uniform(-0.9, 0.7), sea + rng.uniform(0.06, 0.24)
        pen.line([(x, y), (x + 0.2, y)], (214, 240, 250), 0.015)
    ground(pen, (244, 220, 160), sea + rng.uniform(0.36, 0.5), [rng.uniform(-0.06, 0.06) for _ in range(5)])
    for _ in range(5):
        pen.dot(rng.uniform(-0.95, 0.95), rng.uniform(0.5, 0.95), 0.018, (214, 180, 116))


def night(pen: Pen, rng: random.Random) -> None:
    sky(pen, (34, 40, 96))
    for _ in range(14):
        pen.dot(rng.uniform(-0.97, 0.97), rng.uniform(-0.97, 0.1), rng.uniform(0.012, 0.024), (255, 248, 210))
    x, y = rng.choice((-1, 1)) * rng.uniform(0.45, 0.78), rng.uniform(-0.78, -0.55)
    pen.circle(x, y, 0.18, (255, 244, 200))
    if pen.style.paper is None:
        pen.circle(x + 0.08, y - 0.04, 0.15, (34, 40, 96))
    far = rng.uniform(0.15, 0.4)
    ground(pen, (28, 62, 86), far, [rng.uniform(-0.12, 0.12) for _ in range(5)])
    ground(pen, (22, 48, 70), far + 0.28, [rng.uniform(-0.05, 0.05) for _ in range(4)])


def snow(pen: Pen, rng: random.Random) -> None:
    sky(pen, (196, 214, 234))
    far = rng.uniform(-0.2, 0.0)
    for x in (-0.8, -0.35, 0.3, 0.78):
        x, tall = x + rng.uniform(-0.15, 0.15), rng.uniform(0.3, 0.5)
        pen.polygon([(x - 0.13, far + 0.12), (x, far + 0.12 - tall), (x + 0.13, far + 0.12)], (98, 136, 140))
    ground(pen, (232, 241, 250), far, [rng.uniform(-0.06, 0.1) for _ in range(4)])
    ground(pen, (214, 228, 244), far + 0.45, [rng.uniform(-0.05, 0.05) for _ in range(4)])
    for _ in range(16):
        pen.dot(rng.uniform(-0.97, 0.97), rng.uniform(-0.97, 0.3), rng.uniform(0.014, 0.026), (255, 255, 255))


def city(pen: Pen, rng: random.Random) -> None:
    sky(pen, (250, 212, 176))
    street, x = rng.uniform(0.3, 0.45), -1.1
    while x < 1.0:
        wide, top = rng.uniform(0.26, 0.46), rng.uniform(-0.75, -0.05)
        pen.rectangle(x, top, x + wide, street + 0.1, rng.choice(((150, 140, 168), (122, 118, 152), (172, 150, 160))))
        for row in range(3):
            for column in range(2):
                left, upper = x + wide * (0.18 + 0.4 * column), top + 0.1 + 0.2 * row
                if upper < street - 0.15 and rng.random() < 0.75:
                    pen.rectangle(left, upper, left + wide * 0.22, upper + 0.09, (255, 226, 140))
        x += wide
    pen.polygon([(-1.1, street), (1.1, street), (1.1, 1.1), (-1.1, 1.1)], (104, 106, 116))
    for dash in (-0.8, -0.2, 0.4):
        pen.line([(dash, street + 0.34), (dash + 0.3, street + 0.34)], (240, 232, 210), 0.03)


DRAW: dict[str, Callable[[Pen, random.Random], None]] = {f.__name__: f for f in (meadow, beach, night, snow, city)}
