"""Extracting: a LoRA that was merged comes back, whatever the containers; what differs otherwise is named."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Full
from sdlora.lowrank.truncation import Keep, decompose
from sdlora.models.families import components_of
from sdlora.workbench.extract import Extracted, Recipe, extract
from sdlora.workbench.merge import Parent
from tests.conftest import random_adapter
from tests.originals import original
from tests.tiny import tiny_folder, tiny_pipeline
from tests.workbench.test_merge import merged

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ENCODER = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def extracted(base: Path, tuned: Path, keep: Keep = Keep(rank=4), **flags) -> Extracted:  # noqa: B008
    """Run an extraction to its end; its progress names each module."""
    work = extract(open_checkpoint(base), open_checkpoint(tuned), Recipe(keep, **flags))
    seen = []
    while True:
        try:
            seen.append(next(work))
        except StopIteration as end:
            found = end.value
            assert [step.done for step in seen] == list(range(1, seen[-1].total + 1))
            assert {step.path: step.kept for step in seen if step.kept} == found.kept
            assert tuple(step.path for step in seen if not step.kept) == found.unchanged
            return found


def lora(kind: str, suffix: str = "") -> Adapter:
    return random_adapter(components_of(tiny_pipeline(kind)), seed=1, suffix=suffix)


def single_file(path: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    parts = components_of(tiny_pipeline(kind))
    save_file({key: one.to(dtype) for key, one in original(parts, kind).items()}, path, {"format": "pt"})
    return path


def changed(folder: Path, part: str, changes: dict[str, torch.Tensor]) -> Path:
    """The folder with other tensors in one of its files."""
    file = next((folder / part).glob("*.safetensors"))
    save_file(load_file(file) | changes, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("containers", ["folder folder", "file folder", "folder file"])
def test_a_merged_lora_comes_back(tmp_path, kind, containers):
    """Every Linear and Conv2d of every component, from one container to the other."""
    adapter = lora(kind)
    base, tuned = containers.split()
    folder, file = tiny_folder(tmp_path / "a", kind), single_file(tmp_path / "a.safetensors", kind)
    bases = {"folder": folder, "file": file}
    output = {"folder": tmp_path / "b", "file": tmp_path / "b.safetensors"}[tuned]
    merged(bases[tuned], [Parent(adapter)], output)
    found = extracted(bases[base], output)
    assert found.adapter.deltas.keys() == adapter.deltas.keys() and not found.left and not found.unchanged
    for path, delta in adapter.deltas.items():
        wanted = delta.weight(torch.zeros(delta.shape)).double()
        again = found.adapter.deltas[path].weight(torch.zeros(delta.shape)).double()
        assert (again - wanted).norm() <= 1e-5 * wanted.norm(), path
        assert found.kept[path].rank <= 4 and found.kept[path].error < 1e-5


def test_what_is_kept_is_the_best_of_its_rank_in_float64(tmp_path):
    base, tuned = tiny_folder(tmp_path / "a", seed=0), tiny_folder(tmp_path / "b", seed=1)
    found = extracted(base, tuned, Keep(rank=3), components=["text_encoder"])
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    for path, kept in found.kept.items():
        change = after.tensor(path).double() - before.tensor(path).double()
        values = torch.linalg.svdvals(change.flatten(1))
        error = (found.adapter.deltas[path].weight(torch.zeros(change.shape)) - change).norm()
        assert torch.isclose(error, values[3:].norm(), rtol=1e-4), path
        assert abs(kept.energy - float(values[:3].square().sum() / values.square().sum())) < 1e-5
    assert not found.adapter.component("unet")


def test_rules_and_clamp_are_those_of_decompose(tmp_path):
    base, tuned = tiny_folder(tmp_path / "a", seed=0), tiny_folder(tmp_path / "b", seed=1)
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    keep = Keep(rank=8, frobenius=0.8)
    found = extracted(base, tuned, keep, clamp=0.9, components=["text_encoder"], dtype=torch.float16)
    wanted, _ = decompose(after.tensor(ENCODER) - before.tensor(ENCODER), keep, 0.9, torch.float16)
    assert found.adapter.deltas[ENCODER].down.dtype == torch.float16
    assert torch.equal(found.adapter.deltas[ENCODER].up, wanted.up)
    assert json.loads(found.adapter.metadata["sdlora.extracted"]) == {"base": "a", "tuned": "b", "clamp": 0.9}


def test_a_whole_extraction_merged_again_is_the_tuned_model(tmp_path):
    base, tuned = tiny_folder(tmp_path / "a", seed=0), tiny_folder(tmp_path / "b", seed=1)
    found = extracted(base, tuned, Keep(), whole=True)
    merged(base, [Parent(found.adapter)], tmp_path / "c")
    after, again = open_checkpoint(tuned), open_checkpoint(tmp_path / "c")
    for path in after.parameters.keys() - set(found.left):
        torch.testing.assert_close(again.tensor(path), after.tensor(path), rtol=1e-5, atol=1e-6)
    assert all(".embeddings." in path for path in found.left)


def test_rounding_to_another_dtype_is_no_change(tmp_path):
    """The base in bfloat16, the tuned model in float16 and in float32: only what was trained is found."""
    adapter = lora("sd1", suffix="to_q")
    merged(tiny_folder(tmp_path / "a", "sd1"), [Parent(adapter)], tmp_path / "b")
    merged(tmp_path / "a", [Parent(adapter)], tmp_path / "c", torch.float16)
    base = single_file(tmp_path / "a.safetensors", "sd1", torch.bfloat16)
    for tuned in (tmp_path / "b", tmp_path / "c"):
        found = extracted(base, tuned)
        assert found.kept.keys() == adapter.deltas.keys() and not found.left


def test_in_one_dtype_the_smallest_change_counts(tmp_path):
    base, tuned = (single_file(tmp_path / name, "sd1", torch.float16) for name in ("a.safetensors", "b.safetensors"))
    tensors = load_file(tuned)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[key][0, 0] = torch.nextafter(tensors[key][0, 0], torch.tensor(10.0, dtype=torch.float16))
    save_file(tensors, tuned)
    assert extracted(base, tuned).adapter.deltas.keys() == {QUERY}


def test_biases_norms_and_embeddings_that_differ_are_named_or_taken_whole(tmp_path):
    base = tiny_folder(tmp_path / "a", "sd1")
    merged(base, [Parent(lora("sd1", suffix="to_q"))], tmp_path / "b")
    tuned = changed(
        tmp_path / "b", "unet", {"conv_norm_out.weight": torch.full((16,), 2.0), "conv_in.bias": torch.ones(16)}
    )
    changed(tuned, "text_encoder", {"embeddings.token_embedding.weight": torch.zeros(514, 32)})
    found = extracted(base, tuned)
    token = "text_encoder.text_model.embeddings.token_embedding"
    assert set(found.left) == {"unet.conv_norm_out", "unet.conv_in.bias", token}
    found = extracted(base, tuned, whole=True)
    assert found.left == (token,)
    norm = found.adapter.deltas["unet.conv_norm_out"]
    assert isinstance(norm, Full) and torch.equal(norm.diff, torch.ones(16))


def test_an_inpainting_model_gives_what_its_parent_has_too(tmp_path):
    base = tiny_folder(tmp_path / "a", "sd1")
    merged(base, [Parent(lora("sd1", suffix="to_q"))], tmp_path / "b")
    found = extracted(base, changed(tmp_path / "b", "unet", {"conv_in.weight": torch.randn(16, 9, 3, 3)}))
    assert found.left == ("unet.conv_in",) and QUERY in found.kept


def test_an_extraction_that_is_left_early_leaves_no_thread_and_torch_as_it_was(tmp_path):
    base, tuned = tiny_folder(tmp_path / "a", seed=0), tiny_folder(tmp_path / "b", seed=1)
    threads, running = torch.get_num_threads(), threading.active_count()
    work = extract(open_checkpoint(base), open_checkpoint(tuned), Recipe(Keep(rank=4)))
    next(work)
    work.close()
    assert threading.active_count() == running
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads


def test_components_of_one_model_only_are_named(tmp_path):
    base = tiny_folder(tmp_path / "a", "sd1")
    merged(base, [Parent(lora("sd1", suffix="to_q"))], tmp_path / "b")
    tensors = original(components_of(tiny_pipeline("sd1")), "sd1")
    save_file({key: one for key, one in tensors.items() if key.startswith("model.")}, tmp_path / "unet.safetensors")
    found = extracted(tmp_path / "unet.safetensors", tmp_path / "b")
    assert found.absent == ("text_encoder",) and QUERY in found.kept
    with pytest.raises(SdloraError, match="have no 'text_encoder' in common; they share unet"):
        extracted(tmp_path / "unet.safetensors", tmp_path / "b", components=["text_encoder"])


def test_what_cannot_be_extracted_is_refused_in_one_line(tmp_path):
    base = tiny_folder(tmp_path / "a", "sd1")
    nan = changed(
        tiny_folder(tmp_path / "nan", "sd1", seed=1), "unet", {"conv_out.weight": torch.full((4, 16, 3, 3), torch.nan)}
    )
    norm = changed(tiny_folder(tmp_path / "norm", "sd1"), "unet", {"conv_norm_out.weight": torch.full((16,), 2.0)})
    for tuned, message in [
        (tiny_folder(tmp_path / "xl", "sdxl"), "are models of two kinds: .* modules differ, such as unet"),
        (base, "nothing to extract: .* have the same modules$"),
        (norm, "nothing to extract: .*; what differs is in unet.conv_norm_out and has no low rank"),
        (nan, "unet.conv_out holds values that are not finite"),
    ]:
        with pytest.raises(SdloraError, match=message) as caught:
            extracted(base, tuned)
        assert "\n" not in str(caught.value)
