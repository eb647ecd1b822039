"""The picture of conflicts, looked at pixel by pixel."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora.errors import SdloraError
from sdlora.workbench.conflicts import conflicts
from sdlora.workbench.heat_map import (
    ALIKE,
    COLUMN,
    EMPTY,
    GAP,
    MARGIN,
    NAMES,
    OPPOSED,
    ROW,
    heat_map,
    save_heat_map,
)
from tests.workbench.pairs import MODULES, TEXT, low_rank, saved, scaled, told


def pixel(image: Image.Image, row: int, column: int, rows: int) -> Any:
    """Near the left edge of a cell, counted from the last row of the only panel."""
    bottom = image.height - MARGIN - 2 * ROW - (GAP if row < rows - 1 else 0)
    return image.getpixel((MARGIN + NAMES + column * COLUMN + 4, bottom - (rows - row) * ROW + ROW // 2))


def test_the_picture_shows_what_is_against_each_other_in_red(tmp_path: Path) -> None:
    first = {module: low_rank(module, i) for i, module in enumerate(MODULES[1:4])}
    second = {MODULES[1]: scaled(first[MODULES[1]], 0.5), MODULES[2]: scaled(first[MODULES[2]], -1)}
    found = told(tmp_path, first, second)
    image = heat_map(found)
    assert pixel(image, 0, 2, 4) == ALIKE and pixel(image, 1, 2, 4) == OPPOSED
    assert pixel(image, 2, 1, 4) == pixel(image, 2, 2, 4) == EMPTY  # B does not change OUT00
    large, small = (sum(pixel(image, 0, column, 4)) for column in (0, 1))
    assert large < small < 3 * 255  # darker is larger
    save_heat_map(found, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as written:
        assert written.format == "PNG" and written.size == image.size
    with pytest.raises(SdloraError, match="overwrite"):
        save_heat_map(found, tmp_path / "map.png")
    save_heat_map(found, tmp_path / "map.png", overwrite=True)


def test_the_picture_has_a_panel_for_each_pair(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{i}.safetensors", {TEXT: low_rank(TEXT, i)}) for i in range(4)]
    one, six = heat_map(conflicts(files[:2])), heat_map(conflicts(files))
    assert six.width > 2.5 * one.width and six.height > 1.5 * one.height
