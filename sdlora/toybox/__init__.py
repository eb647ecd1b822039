"""Toybox, the small base model that ships with sdlora: a diffusers folder of its own flat, bright world."""

from pathlib import Path


def path() -> Path:
    """The model's folder."""
    return Path(__file__).parent / "model"
