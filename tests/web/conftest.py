"""The app as people meet it: served by its own process, seen through a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdlora import toybox
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.models.families import components_of
from sdlora.models.load import load_pipeline
from tests.conftest import random_adapter
from tests.tiny import tiny_folder
from tests.web.pages import Open

WAIT = 60_000  # milliseconds, for the slowest machine
SERVE = "from sdlora.web.app import serve; serve(models={!r}, libraries=[{!r}], output={!r}, port={})"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Toybox, or a tiny model with random weights where it is not there."""
    there = (toybox.path() / "model_index.json").is_file()
    return "toybox" if there else str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def other_model(model: str) -> str:
    """The same by another name."""
    return str(toybox.path() if model == "toybox" else Path(model, "..", Path(model).name))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A folder with LoRAs that change every picture; "loud" is as beta would be at a weight of 4."""
    folder = tmp_path_factory.mktemp("library")
    components = components_of(load_pipeline(model))
    for seed, name in enumerate(("alpha", "beta")):
        write(random_adapter(components, seed), folder / f"{name}.safetensors")
    beta = random_adapter(components, 1)
    louder = Adapter({path: replace(delta, up=4 * delta.up) for path, delta in beta.deltas.items()})
    write(louder, folder / "loud.safetensors")
    return folder


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory, model: str, other_model: str, library: Path) -> Iterator[str]:
    """The app's address while its process runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    code = SERVE.format([model, other_model], str(library), str(folder / "pictures"), port)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}/"
        _wait_for(url, process, folder / "log.txt")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the app did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium: the system's, or the one that playwright installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=own, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium can be started (install it, e.g. apt-get install chromium): {error}")
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Open]:
    """Opens a page as a visitor of its own. Faults in its scripts, and requests to elsewhere, fail the test."""
    contexts, faults = [], []

    def stay_here(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            faults.append(f"the page asks for {request.url}")

    def open_page(width: int = 1280, height: int = 900) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", stay_here)
        page.goto(address)
        page.locator("#generate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
