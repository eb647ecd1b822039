"""The app as people meet it: served by its own process, seen through a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdlora import toybox
from sdlora.formats.write import write
from sdlora.models.families import components_of
from sdlora.models.load import load_pipeline
from tests.conftest import random_adapter
from tests.tiny import tiny_folder

SERVE = "from sdlora.web.app import serve; serve(models=[{!r}], libraries=[{!r}], output={!r}, port={})"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Toybox, or a tiny model with random weights where it is not there."""
    there = (toybox.path() / "model_index.json").is_file()
    return "toybox" if there else str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A folder with two LoRAs that change every picture."""
    folder = tmp_path_factory.mktemp("library")
    components = components_of(load_pipeline(model))
    for seed, name in enumerate(("alpha", "beta")):
        write(random_adapter(components, seed), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory, model: str, library: Path) -> Iterator[str]:
    """The app's address while its process runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    code = SERVE.format(model, str(library), str(folder / "pictures"), port)
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
