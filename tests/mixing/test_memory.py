"""Memory stays flat however many LoRAs come and go, and the untouched base is not held a second time."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.formats.write import write
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.untouched import Untouched
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

SMAPS = Path("/proc/self/smaps_rollup")
MEGABYTE = 2**20

pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="tells memory apart by what Linux says of it")


def own_memory() -> int:
    """Bytes that are this process's alone; pages of mapped files, which the system can take back, are not counted."""
    (line,) = (line for line in SMAPS.read_text().splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


def test_200_loads_of_distinct_files_leave_memory_flat(tmp_path):
    pipeline, file = tiny_pipeline(), tmp_path / "lora.safetensors"
    mixer = Mixer(pipeline, cache=8 * MEGABYTE)
    adapter = random_adapter(components_of(pipeline), seed=0, rank=256, suffix="attn1.to_k")
    first = next(iter(adapter.deltas.values()))
    contents, before = set(), 0
    for number in range(200):
        first.down[0, 0] = number
        write(adapter, file)
        name = f"lora {number}" if number % 2 else "again and again"
        contents.add(mixer.load(file, name).sha256)
        mixer.apply(mixer.plan({name: 0.1 + number}), live=number % 3 == 0)
        if number % 2:
            mixer.unload(name)
        before = own_memory() if number == 60 else before
    assert len(contents) == 200 and file.stat().st_size > MEGABYTE / 2
    assert mixer.names == ("again and again",)
    assert own_memory() - before < 10 * MEGABYTE, "140 adapters have over 70 MB"


@torch.no_grad()
def test_an_untouched_parameter_that_lies_in_a_file_costs_no_memory(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    parameter = torch.rand(4096, 4096)
    save_file({"large.weight": parameter}, file)
    os.utime(file, (1e9, 1e9))
    grown = {}
    for source in (tmp_path, None):
        untouched, before = Untouched(source), own_memory()
        untouched.keep("unet.large", parameter)
        assert torch.equal(untouched["unet.large"], parameter)
        grown[source] = own_memory() - before
        assert untouched.held == (0 if source else parameter.nbytes)
    assert grown[tmp_path] < parameter.nbytes / 4 and grown[None] > parameter.nbytes / 2
