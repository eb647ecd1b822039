"""Markdown tables, and what was measured on."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
import peft
import torch

GIB = 2**30


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Floats with three digits behind the point; the first column is text."""
    lines = [[*head], ["---", *["---:"] * (len(head) - 1)]]
    lines += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    processor = found[1] if found else "unknown processor"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}"
    return f"{processor}, {torch.get_num_threads()} threads, {memory('MemTotal') / GIB:.0f} GiB; {versions}"


def memory(kind: str) -> int:
    """Bytes of the machine's memory: MemTotal, or MemAvailable."""
    return field(Path("/proc/meminfo").read_text(), kind)


def field(text: str, name: str) -> int:
    """Bytes that the text of a file of /proc tells in kB."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", text, re.M)
    assert found, f"no {name} in {text[:40]!r}"
    return int(found[1]) * 1024
