"""Conversion changes names, numbers' width or laws, and nothing else."""

import pytest
import torch
from safetensors import safe_open

from sdlora import toybox
from sdlora.errors import SdloraError
from sdlora.formats.architectures import sd1
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.formats.read import read
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import IA3, Full, Kronecker, LowRank
from sdlora.lowrank.truncation import Keep
from sdlora.workbench.convert import SOURCE, SOURCE_HASH, convert, plain
from sdlora.workbench.output import Written

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
NORM = "unet.down_blocks.0.resnets.0.norm1"


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


LORA = LowRank(draw(4, 768), draw(320, 4), 1.5)
LOKR = Kronecker(1.0, w1=draw(2, 2), w2=draw(160, 160))


def converted(*args, **settings) -> Written:
    """What a conversion comes to."""
    work = convert(*args, **settings)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def source(tmp_path, deltas, **metadata: str):
    path = tmp_path / "old.safetensors"
    write(Adapter(deltas, metadata), path)
    return path


@pytest.mark.parametrize("naming", ["diffusers", "peft", "comfyui"])
def test_a_lora_goes_there_and_back_unchanged(tmp_path, naming):
    old = source(tmp_path, {KEY: LORA}, **{"modelspec.title": "zib", "sshs_legacy_hash": "of the old file"})
    there, back = tmp_path / ("there" if naming == "peft" else "there.safetensors"), tmp_path / "back.safetensors"
    converted(old, there, naming)
    conversion = converted(there, back, "kohya")
    adapter, receipt = read(back)
    again = adapter.deltas[KEY]
    assert isinstance(again, LowRank) and again.alpha == 1.5
    assert torch.equal(again.down, LORA.down) and torch.equal(again.up, LORA.up)
    assert adapter.metadata["modelspec.title"] == "zib" and "sshs_legacy_hash" not in adapter.metadata
    assert "lora_adapter_metadata" not in adapter.metadata
    assert (adapter.metadata[SOURCE], adapter.metadata[SOURCE_HASH]) == (there.name, conversion.receipts[0].sha256)
    assert conversion.kept == {}


def test_a_law_becomes_plain_lora_on_request_with_its_error(tmp_path):
    old, new = source(tmp_path, {KEY: LORA, QUERY: LOKR}), tmp_path / "new.safetensors"
    with pytest.raises(SdloraError, match=r"cannot hold 1 changes \(lokr\).*to_q; convert it with --to-lora --rank 16"):
        converted(old, new, "diffusers")
    assert not new.exists()
    kept = converted(old, new, "diffusers", to_lora=Keep(rank=16)).kept
    assert list(kept) == [QUERY] and kept[QUERY].rank == 16
    small, _ = read(new)
    wanted = LOKR.weight(torch.zeros(320, 320)).double()
    values = torch.linalg.svdvals(wanted)
    error = (small.deltas[QUERY].weight(torch.zeros(320, 320)) - wanted).norm() / wanted.norm()
    assert abs(float(error) - float(values[16:].norm() / values.norm())) < 1e-5
    assert abs(kept[QUERY].error - float(error)) < 1e-5
    again = small.deltas[KEY]
    assert isinstance(again, LowRank) and torch.equal(again.down, LORA.down)


def test_a_law_that_depends_on_the_base_asks_for_it(tmp_path):
    old, new = source(tmp_path, {QUERY: IA3(draw(320), on_input=False)}), tmp_path / "new"
    with pytest.raises(SdloraError, match=r"to_q: ia3 depends on the base model's weights"):
        converted(old, new, "peft", to_lora=Keep())
    toy = open_checkpoint(toybox.path())
    with pytest.raises(SdloraError, match=r"down_blocks\.2.*to_q: ia3 depends on .*toybox.* has none there"):
        list(
            plain(
                Adapter({QUERY.replace("down_blocks.0", "down_blocks.2"): IA3(draw(1280), False)}), sd1(), Keep(), toy
            )
        )
    base = toy.tensor(QUERY).float()
    old = source(tmp_path, {QUERY: IA3(draw(len(base)), on_input=False)})
    converted(old, new, "peft", to_lora=Keep(), base=toy)
    change, _ = read(new, toy.architecture)
    wanted = base * draw(len(base))[:, None]
    assert (change.deltas[QUERY].weight(base) - wanted).abs().max() <= 1e-6


def test_norms_are_refused_where_they_have_no_name(tmp_path):
    old = source(tmp_path, {KEY: LORA, NORM: Full(draw(320))})
    with pytest.raises(SdloraError, match=r"peft cannot hold 1 changes \(full\).*norm1; choose kohya or comfyui"):
        converted(old, tmp_path / "new", "peft", to_lora=Keep(rank=4))


def test_the_dtype_is_kept_unless_another_is_asked_for(tmp_path):
    old = tmp_path / "old.safetensors"
    write(Adapter({KEY: LORA}), old, dtype=torch.bfloat16)
    for dtype, wanted in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        converted(old, tmp_path / "new.safetensors", "comfyui", dtype, overwrite=True)
        with safe_open(tmp_path / "new.safetensors", "pt") as file:
            held = {key: file.get_tensor(key).dtype for key in file.keys()}
        assert {key.endswith(".alpha"): dtype for key, dtype in held.items()} == {True: torch.float32, False: wanted}


def test_a_file_can_be_converted_in_its_place(tmp_path):
    old = source(tmp_path, {KEY: LORA})
    with pytest.raises(SdloraError, match="there already"):
        converted(old, old, "diffusers")
    converted(old, old, "diffusers", overwrite=True)
    again = read(old)[0].deltas[KEY]
    assert torch.equal(again.weight(torch.zeros(320, 768)), LORA.weight(torch.zeros(320, 768)))
    assert [file.name for file in tmp_path.iterdir()] == ["old.safetensors"]


def test_a_folder_with_other_things_is_replaced_only_if_asked(tmp_path):
    old, new = source(tmp_path, {KEY: LORA}), tmp_path / "new"
    new.mkdir()
    (new / "notes.txt").write_text("mine")
    with pytest.raises(SdloraError, match="there already"):
        converted(old, new, "peft")
    assert (new / "notes.txt").read_text() == "mine"
    converted(old, new, "peft", overwrite=True)
    assert read(new)[0].deltas.keys() == {KEY} and not (new / "notes.txt").exists()
