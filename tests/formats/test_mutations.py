"""Valid files of every kind, damaged at random: the reader answers with a receipt or one clear line, and at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.formats.architectures import sd1
from sdlora.formats.read import describe, read
from sdlora.formats.sources import CONFIG, WEIGHTS
from sdlora.lowrank.adapter import Adapter
from tests.formats.damage import MUTATIONS, Mutation
from tests.formats.valid_files import MODULES, Draft, draft_of, tensors_of

SLOWEST = 1.0  # seconds for a file to be described and read

mutations = st.lists(
    st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 2**20), st.integers(0, 2**14)), min_size=1, max_size=3
)


def put(folder: Path, kind: str, draft: Draft) -> Path:
    """The draft as a file (or PEFT folder) that was last changed a minute ago, so that nobody waits for its end."""
    path = folder / (WEIGHTS if draft.config is not None else f"{kind}.safetensors")
    path.write_bytes(draft.written())
    os.utime(path, (time.time() - 60,) * 2)
    if draft.config is None:
        return path
    (folder / CONFIG).write_text(draft.config, "utf-8", "surrogatepass")
    return folder


def tried(act: Callable[[], Any]) -> Any:
    """What it gives, None where it refuses in one line."""
    try:
        return act()
    except SdloraError as error:
        line = str(error)
        assert line and len(line) < 1500, repr(line)
        assert len(line.splitlines()) == 1, repr(line)
        return None


@cache
def base_of(parameter: str) -> Tensor:
    form = sd1().shape_of(parameter)
    assert form is not None
    return torch.randn(form, generator=torch.Generator().manual_seed(1))


def use(adapter: Adapter) -> None:
    """What was read can be computed with: nothing is left to fail when it is applied."""
    for parameter, delta in adapter.deltas.items():
        base = base_of(parameter)
        assert tuple(delta.weight(base).shape) == tuple(base.shape)


def seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def check(folder: Path, kind: str, steps: list[tuple[Mutation, int, int]]) -> None:
    draft = draft_of(kind)
    for mutate, place, how in steps:
        mutate(draft, place, how)
    path = put(folder, kind, draft)

    found: list[Any] = []

    def described_and_read() -> None:
        tried(lambda: describe(path))
        found.append(tried(lambda: read(path)))

    took = seconds(described_and_read)
    if took > SLOWEST:  # a busy machine may pause once; a hang is there again
        took = seconds(described_and_read)
    assert took < SLOWEST, f"{took:.1f} s"
    applied = found[-1] or tried(lambda: read(path, sd1(), partial=True))
    if applied:
        tried(lambda: use(applied[0]))


def run(folder: Path, count: int) -> None:
    for kind in MODULES:
        read(put(folder, kind, draft_of(kind)))  # what is built once only, such as the architectures, costs no file
    done = 0

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(MODULES)), mutations)
    def each(kind: str, steps: list[tuple[Mutation, int, int]]) -> None:
        nonlocal done
        done += 1
        check(folder, kind, steps)

    each()
    assert done >= count


@pytest.mark.parametrize("kind", MODULES)
def test_the_files_are_valid_before_they_are_damaged(tmp_path, kind):
    draft = draft_of(kind)
    path = put(tmp_path, kind, draft)
    if draft.config is None:
        assert load(path.read_bytes()).keys() == tensors_of(kind).keys()
    adapter, receipt = read(path, sd1())
    assert receipt.complete, receipt.summary()
    assert receipt.tokens or receipt.applied
    use(adapter)


def test_damaged_files_get_a_receipt_or_one_clear_line_at_once(tmp_path):
    run(tmp_path, 1_500)


@pytest.mark.slow
def test_twenty_thousand_damaged_files_get_a_receipt_or_one_clear_line_at_once(tmp_path):
    run(tmp_path, 20_000)
