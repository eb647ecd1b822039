"""What the README says works as written: its commands and its Python run here, in order, in one fresh folder."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# A block of code, with the comment before it that says why it is not run, if there is one.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n\s*)?```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A block of code; `line` is where it starts in the README; `reason` says why it is not run, "" if it is."""

    line: int
    language: str
    code: str
    reason: str


def blocks(text: str) -> list[Block]:
    """The bash and python blocks of a Markdown text."""
    return [
        Block(text[: found.start("code")].count("\n"), found["language"], found["code"], found["reason"] or "")
        for found in BLOCK.finditer(text)
    ]


def test_blocks_and_reasons_are_told_apart() -> None:
    text = "a\n```bash\nls\n```\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n```toml\nrank = 1\n```\n"
    assert blocks(text) == [Block(2, "bash", "ls\n", ""), Block(6, "python", "x = 1\n", "needs a GPU")]


def test_what_the_readmes_link_to_is_there() -> None:
    for readme in (README, ROOT / "tools/toybox/README.md", ROOT / "benchmarks/README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme.read_text("utf-8")):
            assert (readme.parent / target).exists(), f"{readme} links to {target}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What someone has who cloned the project: its sample datasets, and nothing made by earlier runs."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "datasets", folder / "datasets")
    return folder


def test_the_readme_runs_as_written(workplace: Path) -> None:
    scripts = Path(sys.executable).parent
    path = os.pathsep.join((str(scripts), os.environ.get("PATH", "")))
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python_path}
    run = [block for block in blocks(README.read_text("utf-8")) if not block.reason]
    for block in run:
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.code], cwd=workplace, env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"README.md line {block.line}:\n{block.code}\n{done.stdout}\n{done.stderr}"
    assert run, "no block of README.md was run"
