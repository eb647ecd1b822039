"""A tiny model, a small dataset of two shapes, and runs over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from sdlora.training.config import TrainConfig

COLOURS = ("red", "green", "blue", "orange", "purple")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny SD 1 pipeline."""
    from tests.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model"), "sd1")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned pictures in two buckets."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (96, 64) if number % 2 else (64, 64), "white")
        ImageDraw.Draw(image).ellipse((10, 10 + number, 50, 50), fill=colour)
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} ball, number {number}")
    return folder


@pytest.fixture
def configure(model: Path, dataset: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config for the tiny model, with changes."""

    def made(**changes: Any) -> TrainConfig:
        usual = {"dataset": str(dataset), "model": str(model), "output": str(tmp_path / "run"), "rank": 4, "steps": 2}
        return TrainConfig(**{**usual, "tracker": "none", "save_every": 0, "learning_rate": 1e-3, **changes})

    return made
