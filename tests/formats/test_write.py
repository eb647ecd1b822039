"""Written files are what other programs read: diffusers is the oracle; and they are whole or not there."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open

from sdlora.errors import SdloraError
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of, family_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def attention_adapter(kind: str) -> Adapter:
    adapter = random_adapter(components_of(tiny_pipeline(kind)), seed=3)
    return Adapter({path: delta for path, delta in adapter.deltas.items() if path.endswith(ATTENTION)})


def full_adapter(kind: str) -> Adapter:
    return random_adapter(components_of(tiny_pipeline(kind)), seed=3)


@torch.no_grad()
def outputs(pipeline) -> list[torch.Tensor]:
    """Conditioning of two captions and the UNet's prediction from it."""
    family = family_of(pipeline)
    told = family.encode(pipeline, ["a red cat", "zib on a beach"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [*told.values(), family.predict(pipeline.unet, latents, torch.tensor([10, 500]), told, None)]


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("make", [attention_adapter, full_adapter])
def test_diffusers_makes_the_same_of_a_file_as_the_mixer(tmp_path, kind, naming, make: Callable[[str], Adapter]):
    path = tmp_path / "a.safetensors"
    deltas = dict(make(kind).deltas)
    if naming == "kohya":  # diffusers 0.42 takes apart the kohya name of SDXL's added embedding wrongly
        deltas = {path: delta for path, delta in deltas.items() if "add_embedding" not in path}
    write(Adapter(deltas), path, naming)
    ours, theirs = tiny_pipeline(kind), tiny_pipeline(kind)
    base = outputs(ours)
    mixer = Mixer(ours)
    assert mixer.load(path, "a").complete
    mixer.set({"a": 1.0})
    theirs.load_lora_weights(str(path))
    for without, mixed, oracle in zip(base, outputs(ours), outputs(theirs), strict=True):
        assert (without - mixed).abs().max() > 1e-3, "the LoRA has no effect"
        assert (mixed - oracle).abs().max() <= 1e-5


def test_the_first_encoder_of_two_is_named_so_even_alone(tmp_path):
    adapter = attention_adapter("sdxl")
    first = {path: delta for path, delta in adapter.deltas.items() if path.startswith("text_encoder.")}
    write(Adapter(first, {"ss_base_model_version": "sdxl_base_v1-0"}), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert all(key.startswith("lora_te1_") for key in file.keys())


def test_metadata_is_written_with_what_others_show(tmp_path):
    adapter = attention_adapter("sd1")
    path = tmp_path / "a.safetensors"
    write(Adapter(adapter.deltas, {"modelspec.title": "my style"}), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["modelspec.title"] == "my style"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(attention_adapter("sd1"), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SdloraError, match="No space left"):
        write(random_adapter(components_of(tiny_pipeline()), 1), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("adapter", "naming", "message"),
    [(Adapter({}), "kohya", "adapter is empty"), (attention_adapter("sd1"), "comfy", "unknown naming 'comfy'")],
)
def test_what_cannot_be_written_is_refused(tmp_path, adapter, naming, message):
    with pytest.raises(SdloraError, match=message):
        write(adapter, tmp_path / "a.safetensors", naming)
    assert not list(tmp_path.iterdir())
