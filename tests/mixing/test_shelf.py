"""The shelf: adapters are known by content, the cache keeps to its bytes, and what has changed is seen."""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.formats.architectures import architecture_of
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import DoRA, LowRank
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.shelf import Shelf, content_of, size_of
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

PARTS = components_of(tiny_pipeline())
ARCHITECTURE = architecture_of(PARTS)


def file_of(folder: Path, seed: int, name: str = "") -> Path:
    path = folder / f"{name or seed}.safetensors"
    write(Adapter(random_adapter(PARTS, seed, suffix="to_q").deltas), path, "kohya")
    os.utime(path, (1, 1 + seed))  # settled long ago
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read."""
    from sdlora.mixing import shelf

    seen: list[Path] = []
    original = shelf.read
    monkeypatch.setattr(shelf, "read", lambda path, *rest: (seen.append(path), original(path, *rest))[1])
    return seen


def test_what_is_on_the_shelf_is_not_read_again_and_the_least_used_goes_first(tmp_path: Path, reads: list[Path]):
    files = [file_of(tmp_path, seed) for seed in range(4)]
    size = size_of(Shelf(ARCHITECTURE, 0).read(files[0]).adapter)
    reads.clear()
    shelf = Shelf(ARCHITECTURE, 3 * size)
    for index in (0, 1, 2, 0, 3, 0, 2):
        shelf.read(files[index])
        assert shelf.size <= 3 * size
    assert reads == [files[0], files[1], files[2], files[3]]
    shelf.read(files[1])
    assert reads[4:] == [files[1]], "it left when the fourth came"


def test_an_adapter_larger_than_the_shelf_is_read_and_not_kept(tmp_path: Path):
    shelf = Shelf(ARCHITECTURE, 100)
    assert shelf.read(file_of(tmp_path, 0)).adapter.deltas and shelf.size == 0


def test_the_same_content_is_the_same_adapter_whatever_it_is_called(tmp_path: Path):
    shelf = Shelf(ARCHITECTURE, 2**30)
    copy = Path(shutil.copy(file_of(tmp_path, 0, "a"), tmp_path / "b.safetensors"))
    first, second = shelf.read(tmp_path / "a.safetensors"), shelf.read(copy)
    assert first.adapter is second.adapter and first.content == second.content
    assert second.receipt and second.receipt.path == copy


def test_an_adapter_in_use_is_not_read_again_whichever_of_its_files_came_first(tmp_path: Path, reads: list[Path]):
    shelf, one = Shelf(ARCHITECTURE, 0), file_of(tmp_path, 0, "a")
    other = Path(shutil.copy2(one, tmp_path / "b.safetensors"))
    first, second = shelf.read(one), shelf.read(other)
    del first
    gc.collect()
    assert shelf.read(other).adapter is second.adapter and shelf.read(one).adapter is second.adapter
    assert reads == [one, other]
    for path in (one, other):
        receipt = shelf.read(path).receipt
        assert receipt and receipt.path == path


def test_what_is_loaded_again_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mixer, one = Mixer(tiny_pipeline()), file_of(tmp_path, 0, "a")
    other = Path(shutil.copy2(one, tmp_path / "b.safetensors"))
    mixer.load(one, name="a")
    mixer.add(random_adapter(PARTS, 1), "b")
    mixer.set({"a": 1.0, "b": 0.5})
    monkeypatch.setattr(mixer, "_become", lambda *_: pytest.fail("something is to be changed"))
    for path in (other, one, other):
        assert mixer.load(path, name="a") == mixer.receipt("a") and mixer.load(path, name="a").path == path
    mixer.add(random_adapter(PARTS, 1), "b")
    with pytest.raises(pytest.fail.Exception):
        mixer.add(random_adapter(PARTS, 2), "b")


def test_new_content_under_an_old_name_is_seen_at_once(tmp_path: Path):
    pipeline = tiny_pipeline()
    mixer, path = Mixer(pipeline), file_of(tmp_path, 0, "mine")
    mixer.load(path)
    mixer.set({"mine": 1.0})
    plan, weight = mixer.plans[0], pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    before = weight.clone()
    old = Path(shutil.copy(path, tmp_path / "old"))
    path = file_of(tmp_path, 1, "mine")
    mixer.load(path)
    assert not torch.equal(weight, before), "the weights in force follow the file"
    with pytest.raises(SdloraError, match="another content than the plan"):
        mixer.apply(plan)
    shutil.copy(old, path)
    mixer.load(path)
    mixer.apply(plan)
    assert torch.equal(weight, before)


def test_content_is_all_that_counts_of_an_adapter():
    def adapter(alpha: float = 2.0, by_output: bool = False, path: str = "unet.conv_in", shift: float = 0.0) -> Adapter:
        inner = LowRank(torch.ones(2, 4) + shift, torch.ones(4, 2), alpha)
        return Adapter({path: DoRA(inner, torch.ones(4), by_output)})

    contents = [
        adapter(),
        adapter(alpha=3.0),
        adapter(by_output=True),
        adapter(path="unet.conv_out"),
        adapter(shift=1e-6),
        Adapter(adapter().deltas, embeddings={"<s>": {"text_encoder": torch.ones(1, 4)}}),
    ]
    assert len({content_of(one) for one in contents}) == len(contents)
    assert content_of(adapter()) == content_of(Adapter(adapter().deltas, metadata={"what": "counts not"}))
