"""The things of toybox's world. Each is drawn in local coordinates (-1 .. 1, y down, its ground at y = 1) by a pen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.toybox.world import Colour, Pen

DARK: Colour = (40, 36, 48)
CREAM: Colour = (255, 243, 214)
GLASS: Colour = (196, 232, 248)
GOLD: Colour = (255, 214, 92)
STEEL: Colour = (176, 184, 198)
WOOD: Colour = (134, 92, 56)
LEAF: Colour = (92, 172, 74)


def tint(colour: Colour, amount: float) -> Colour:
    """Towards white for amount > 0, towards black for amount < 0."""
    goal = 255 if amount > 0 else 0
    return tuple(int(c + (goal - c) * abs(amount)) for c in colour)  # type: ignore[return-value]


def cat(pen: Pen, colour: Colour) -> None:
    pen.line([(0.45, 0.85), (0.8, 0.75), (0.9, 0.4), (0.72, 0.15)], tint(colour, -0.25), 0.17)
    pen.ellipse(0, 0.5, 0.52, 0.5, colour)
    pen.polygon([(-0.52, -0.35), (-0.5, -0.98), (-0.1, -0.62)], colour)
    pen.polygon([(0.52, -0.35), (0.5, -0.98), (0.1, -0.62)], colour)
    pen.ellipse(0, -0.25, 0.58, 0.47, colour)
    pen.ellipse(0, 0.62, 0.26, 0.3, tint(colour, 0.45))
    pen.eye(-0.24, -0.3, 0.13)
    pen.eye(0.24, -0.3, 0.13)
    pen.dot(0, -0.1, 0.07, (236, 120, 140))
    for side in (-1, 1):
        pen.line([(side * 0.2, -0.05), (side * 0.68, -0.12)], DARK, 0.01)
        pen.line([(side * 0.2, 0.0), (side * 0.66, 0.06)], DARK, 0.01)


def fish(pen: Pen, colour: Colour) -> None:
    pen.polygon([(0.5, 0.0), (1.0, -0.48), (0.9, 0.0), (1.0, 0.48)], tint(colour, -0.2))
    pen.polygon([(-0.2, -0.4), (0.15, -0.85), (0.38, -0.3)], tint(colour, -0.2))
    pen.ellipse(-0.1, 0.0, 0.78, 0.52, colour)
    pen.polygon([(0.0, 0.08), (0.34, 0.34), (0.02, 0.36)], tint(colour, 0.4))
    pen.line([(-0.38, -0.36), (-0.28, 0.0), (-0.38, 0.36)], tint(colour, -0.35), 0.05)
    pen.eye(-0.55, -0.12, 0.13)
    pen.line([(-0.84, 0.16), (-0.68, 0.2)], DARK, 0.03)


def bird(pen: Pen, colour: Colour) -> None:
    pen.line([(-0.1, 0.55), (-0.1, 0.98)], (230, 140, 40), 0.07)
    pen.line([(0.18, 0.55), (0.18, 0.98)], (230, 140, 40), 0.07)
    pen.polygon([(0.45, 0.1), (1.0, -0.25), (0.92, 0.25), (0.45, 0.42)], tint(colour, -0.25))
    pen.ellipse(0.05, 0.2, 0.6, 0.46, colour)
    pen.polygon([(-0.7, -0.5), (-1.0, -0.32), (-0.66, -0.24)], (246, 160, 40))
    pen.circle(-0.42, -0.38, 0.38, colour)
    pen.polygon([(-0.14, 0.05), (0.55, 0.0), (0.2, 0.48)], tint(colour, -0.22))
    pen.eye(-0.5, -0.44, 0.12)


def house(pen: Pen, colour: Colour) -> None:
    pen.rectangle(0.38, -0.9, 0.6, -0.3, tint(colour, -0.4))
    pen.rectangle(-0.75, -0.15, 0.75, 1.0, colour)
    pen.polygon([(-0.98, -0.12), (0.0, -0.92), (0.98, -0.12)], tint(colour, -0.38))
    pen.rectangle(-0.2, 0.35, 0.2, 1.0, tint(WOOD, 0.1))
    pen.rectangle(-0.62, 0.1, -0.32, 0.42, GOLD)
    pen.rectangle(0.32, 0.1, 0.62, 0.42, GOLD)
    pen.dot(0.1, 0.68, 0.04, CREAM)


def car(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.55, 0.15), (-0.36, -0.32), (0.36, -0.32), (0.62, 0.15)], colour)
    pen.polygon([(-0.4, 0.1), (-0.28, -0.2), (-0.04, -0.2), (-0.04, 0.1)], GLASS)
    pen.polygon([(0.06, 0.1), (0.06, -0.2), (0.3, -0.2), (0.46, 0.1)], GLASS)
    pen.rectangle(-1.0, 0.1, 1.0, 0.66, colour, 0.16)
    pen.circle(-0.52, 0.68, 0.28, DARK)
    pen.circle(0.52, 0.68, 0.28, DARK)
    pen.circle(-0.52, 0.68, 0.12, STEEL)
    pen.circle(0.52, 0.68, 0.12, STEEL)
    pen.dot(-0.86, 0.3, 0.09, GOLD)
    pen.line([(0.02, 0.3), (0.2, 0.3)], DARK, 0.03)


def tree(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.14, 1.0), (-0.1, 0.1), (0.1, 0.1), (0.14, 1.0)], WOOD)
    pen.circle(-0.42, 0.02, 0.4, colour)
    pen.circle(0.42, 0.02, 0.4, colour)
    pen.circle(0.0, -0.45, 0.52, colour)
    for x, y in ((-0.42, 0.05), (0.36, -0.1), (0.0, -0.6), (-0.16, -0.26), (0.5, 0.18)):
        pen.dot(x, y, 0.06, tint(colour, 0.5))


def boat(pen: Pen, colour: Colour) -> None:
    pen.line([(0.0, 0.4), (0.0, -1.0)], WOOD, 0.08)
    pen.polygon([(0.08, -0.9), (0.08, 0.28), (0.8, 0.28)], CREAM)
    pen.polygon([(-0.08, -0.6), (-0.08, 0.28), (-0.6, 0.28)], tint(colour, 0.35))
    pen.polygon([(-0.98, 0.4), (0.98, 0.4), (0.62, 0.95), (-0.62, 0.95)], colour)
    pen.line([(-0.84, 0.58), (0.84, 0.58)], tint(colour, -0.35), 0.05)
    pen.circle(-0.3, 0.72, 0.08, GLASS)
    pen.circle(0.3, 0.72, 0.08, GLASS)


def flower(pen: Pen, colour: Colour) -> None:
    pen.line([(0.0, -0.1), (0.04, 0.5), (0.0, 1.0)], (52, 128, 58), 0.09)
    pen.ellipse(0.3, 0.62, 0.28, 0.11, LEAF)
    pen.ellipse(-0.28, 0.76, 0.26, 0.11, LEAF)
    for i in range(6):
        angle = math.tau * i / 6 + 0.3
        pen.circle(0.4 * math.cos(angle), -0.38 + 0.4 * math.sin(angle), 0.25, colour)
    pen.circle(0.0, -0.38, 0.22, GOLD if colour[2] > 60 or colour[1] < 120 else (150, 86, 40))


def rocket(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.2, 0.6), (0.0, 1.0), (0.2, 0.6)], (255, 170, 40))
    pen.polygon([(-0.3, 0.15), (-0.66, 0.72), (-0.26, 0.6)], tint(colour, -0.35))
    pen.polygon([(0.3, 0.15), (0.66, 0.72), (0.26, 0.6)], tint(colour, -0.35))
    pen.polygon([(-0.3, -0.4), (-0.36, 0.2), (-0.24, 0.64), (0.24, 0.64), (0.36, 0.2), (0.3, -0.4)], colour)
    pen.polygon([(-0.3, -0.4), (-0.14, -0.78), (0.0, -1.0), (0.14, -0.78), (0.3, -0.4)], tint(colour, -0.35))
    pen.circle(0.0, -0.1, 0.18, GLASS)
    pen.line([(-0.22, 0.4), (0.22, 0.4)], tint(colour, -0.4), 0.05)


def robot(pen: Pen, colour: Colour) -> None:
    pen.line([(0.0, -0.65), (0.0, -0.92)], STEEL, 0.07)
    pen.dot(0.0, -0.92, 0.1, (240, 80, 70))
    pen.line([(-0.5, 0.1), (-0.82, 0.42)], STEEL, 0.13)
    pen.line([(0.5, 0.1), (0.82, 0.42)], STEEL, 0.13)
    pen.rectangle(-0.36, 0.6, -0.12, 1.0, STEEL)
    pen.rectangle(0.12, 0.6, 0.36, 1.0, STEEL)
    pen.rectangle(-0.52, -0.02, 0.52, 0.7, colour, 0.08)
    pen.rectangle(-0.44, -0.7, 0.44, -0.06, colour, 0.14)
    pen.eye(-0.2, -0.42, 0.13)
    pen.eye(0.2, -0.42, 0.13)
    pen.line([(-0.2, -0.18), (0.2, -0.18)], DARK, 0.04)
    pen.rectangle(-0.26, 0.16, 0.26, 0.48, tint(colour, 0.5))
    pen.dot(-0.1, 0.32, 0.06, (240, 80, 70))
    pen.dot(0.1, 0.32, 0.06, (70, 180, 90))


def zib(pen: Pen, colour: Colour) -> None:
    """The sample character: a one-eyed teal creature with a striped belly. It is always the same colour."""
    teal, tip, stripe = (58, 188, 172), (255, 128, 48), (255, 222, 110)
    for side in (-1, 1):
        pen.line([(side * 0.2, -0.6), (side * 0.42, -0.86), (side * 0.66, -0.84)], tint(teal, -0.4), 0.07)
        pen.dot(side * 0.68, -0.82, 0.13, tip)
        pen.ellipse(side * 0.34, 0.92, 0.24, 0.1, tip)
    pen.polygon([(-0.62, 0.0), (-0.98, -0.22), (-0.88, 0.26), (-0.62, 0.36)], tint(teal, -0.2))
    pen.polygon([(0.62, 0.0), (0.98, -0.22), (0.88, 0.26), (0.62, 0.36)], tint(teal, -0.2))
    pen.ellipse(0.0, 0.12, 0.7, 0.78, teal)
    for y, half in ((0.42, 0.42), (0.6, 0.34)):
        pen.line([(-half, y), (0.0, y + 0.08), (half, y)], stripe, 0.1)
    pen.eye(0.0, -0.16, 0.34)
    pen.line([(-0.18, 0.26), (0.0, 0.31), (0.18, 0.26)], DARK, 0.04)


DRAW: dict[str, Callable[[Pen, Colour], None]] = {
    f.__name__: f for f in (cat, fish, bird, house, car, tree, boat, flower, rocket, robot, zib)
}
