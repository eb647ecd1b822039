"""What tests do with a page of the app."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.generation.job import Job
from sdlora.generation.png import read_job

Open = Callable[..., Any]


def set_number(page: Any, where: str, value: float) -> None:
    """Type into the number box of a slider or number field."""
    box = page.locator(f"{where} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def choose_lora(page: Any, row: int, name: str) -> None:
    page.locator(f"#lora-{row} .lora-head input:not([type=checkbox])").click()
    page.get_by_role("option", name=name).click()
    page.locator(f"#words-{row}", has_text="trigger words").wait_for()
    page.wait_for_function("() => !document.querySelector('[role=option]')")  # the list has faded away


def unfold(page: Any, where: str) -> None:
    """Open a fold, and wait until the page is idle: what is typed while gradio still builds what is in it, is lost."""
    page.locator(f"{where} .label-wrap").first.click()
    page.evaluate("() => new Promise(done => requestIdleCallback(() => requestIdleCallback(done)))")


def generate(page: Any, count: int = 1) -> bytes:
    """Press the button, wait for the pictures, and return the pixels of the newest."""
    shown = page.locator("#gallery img").count() + count
    page.locator("#generate").click()
    page.wait_for_function("count => document.querySelectorAll('#gallery img').length == count", arg=shown)
    page.locator("#generate").wait_for()
    return pixels(page, 0)


def pixels(page: Any, index: int) -> bytes:
    """Of a picture in the gallery, from the newest on."""
    address = page.locator("#gallery img").nth(index).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body())).tobytes()


def job_shown(page: Any) -> Job:
    """The job in the file of the picture whose settings are shown."""
    return read_job(file_shown(page))


def file_shown(page: Any) -> Path:
    return Path(page.locator("#details dd").last.inner_text())
