"""Written files tell what others show, are whole or not there, and hold all or are refused."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from sdlora.errors import SdloraError
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import DoRA, LowRank
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def attention_adapter(kind: str) -> Adapter:
    adapter = random_adapter(components_of(tiny_pipeline(kind)), seed=3)
    return Adapter({path: delta for path, delta in adapter.deltas.items() if path.endswith(ATTENTION)})


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


QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def small(value: float = 1.0) -> Adapter:
    return Adapter({QUERY: LowRank(torch.full((2, 320), value), torch.ones(320, 2), 0.1)})


def test_what_16_bits_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(SdloraError, match=r"attn1_to_q\.lora_down\.weight has values that float16 cannot hold"):
        write(small(1e5), tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    write(small(1e5), tmp_path / "a.safetensors", dtype=torch.bfloat16)


def test_alphas_keep_their_digits_in_16_bits(tmp_path):
    write(small(), tmp_path / "a.safetensors", dtype=torch.float16)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        alpha = next(file.get_tensor(key) for key in file.keys() if key.endswith(".alpha"))
    assert alpha.dtype == torch.float32 and alpha == torch.tensor(0.1)


def test_magnitudes_beside_plain_lora_are_refused_in_pefts_names(tmp_path):
    plain = small().deltas[QUERY]
    mixed = {QUERY: plain, QUERY.replace("to_q", "to_k"): DoRA(plain, torch.ones(320))}
    for naming in ("peft", "diffusers"):
        with pytest.raises(SdloraError, match=r"\(lora \+ dora\) beside others without a magnitude.*choose kohya"):
            write(Adapter(mixed), tmp_path / "a", naming)
    write(Adapter(mixed), tmp_path / "a.safetensors")


def test_learned_tokens_are_refused_where_they_have_no_name(tmp_path):
    adapter = Adapter(small().deltas, embeddings={"zib": {"text_encoder": torch.ones(1, 768)}})
    with pytest.raises(SdloraError, match=r"learned tokens \(zib\)"):
        write(adapter, tmp_path / "a.safetensors", "diffusers")


def test_a_folder_replaces_a_lora_and_nothing_else(tmp_path):
    write(small(), tmp_path / "lora", "peft")
    (tmp_path / "lora" / "text_encoder").mkdir()
    (tmp_path / "lora" / "text_encoder" / "adapter_config.json").write_text("{}")
    write(small(), tmp_path / "lora", "peft")
    held = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert held == ["lora/unet/adapter_config.json", "lora/unet/adapter_model.safetensors"]
    (tmp_path / "lora" / "thesis.txt").write_text("mine")
    with pytest.raises(SdloraError, match="holds other things than a LoRA"):
        write(small(), tmp_path / "lora", "peft")
    assert (tmp_path / "lora" / "thesis.txt").read_text() == "mine"
    write(small(), tmp_path / "lora", "peft", overwrite=True)
    assert not (tmp_path / "lora" / "thesis.txt").exists()
    with pytest.raises(SdloraError, match="name of a file"):
        write(small(), tmp_path / "a.safetensors", "peft")


def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    write(small(), tmp_path / "lora", "peft")
    before = (tmp_path / "lora" / "unet" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SdloraError, match="No space left"):
        write(small(2.0), tmp_path / "lora", "peft")
    assert (tmp_path / "lora" / "unet" / "adapter_model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["lora"]


def test_alphas_are_told_once(tmp_path):
    stale = Adapter(small().deltas, {"lora_adapter_metadata": '{"unet.lora_alpha": 7}'})
    write(stale, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
    write(stale, tmp_path / "b.safetensors", "diffusers")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert not any("alpha" in key for key in file.keys())
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 0.1
