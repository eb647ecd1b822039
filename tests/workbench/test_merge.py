"""Merging: against float64, the mixer and diffusers; the untouched stays to the bit, what fails leaves nothing."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Full, LowRank
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.shelf import content_of
from sdlora.models.families import components_of
from sdlora.models.load import load_pipeline
from sdlora.workbench.merge import Parent, merge
from tests.conftest import random_adapter
from tests.formats.test_checkpoints import shard
from tests.originals import original
from tests.tiny import tiny_folder, tiny_pipeline

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half a unit in the last place


def merged(base: Path, parents: list[Parent], output: Path, dtype=None, overwrite=False):
    """Run a merge to its end; its progress counts up to the total."""
    work = merge(open_checkpoint(base), parents, output, dtype, overwrite)
    done = 0
    while True:
        try:
            step = next(work)
        except StopIteration as end:
            assert done == step.total
            return end.value
        done += 1
        assert step.done == done


def adapters(kind: str, suffix: str = "") -> list[Adapter]:
    components = components_of(tiny_pipeline(kind))
    return [random_adapter(components, seed, suffix=suffix) for seed in (1, 2)]


def single_file(path: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A single file with a VAE, a schedule and an average beside what a LoRA can change."""
    tensors = {key: one.to(dtype) for key, one in original(components_of(tiny_pipeline(kind)), kind).items()}
    tensors["first_stage_model.encoder.conv_in.weight"] = torch.randn(8, 3, 3, 3)
    tensors["model_ema.diffusion_modelout2weight"] = torch.randn(4, 16, 3, 3)
    tensors["betas"] = torch.randn(10, dtype=torch.float64)
    tensors["num_updates"] = torch.tensor(7)
    save_file(tensors, path, {"format": "pt", "modelspec.title": "tiny", "modelspec.hash_sha256": "0x0"})
    return path


def hashes(root: Path) -> dict[str, str]:
    files = [root] if root.is_file() else [file for file in root.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def exact(base: torch.Tensor, terms: list[tuple[LowRank, float]]) -> torch.Tensor:
    """W0 + sum(weight * alpha / rank * up @ down) in float64."""
    total = base.double()
    for delta, weight in terms:
        product = delta.up.double().flatten(1) @ delta.down.double().flatten(1)
        total = total + weight * delta.alpha / delta.rank * product.reshape(base.shape)
    return total


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_single_files_hold_the_sum_of_float64_rounded_once(tmp_path, kind, dtype):
    base = single_file(tmp_path / "a.safetensors", kind, dtype)
    first, second = adapters(kind)
    report = merged(base, [Parent(first, 0.7), Parent(second, -0.4)], tmp_path / "b.safetensors")
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "b.safetensors")
    assert set(report.changed) == set(first.deltas)
    for path in before.parameters:
        terms = [(one.deltas[path], weight) for one, weight in ((first, 0.7), (second, -0.4)) if path in one.deltas]
        wanted, found = exact(before.tensor(path), terms), after.tensor(path)
        assert found.dtype == dtype
        if terms:
            # half a unit of the dtype, and what sums in float32 lose
            bound = HALF[dtype] * wanted.abs() + 1e-6 * (wanted.abs() + before.tensor(path).double().abs().max())
            assert ((found.double() - wanted).abs() <= bound).all(), path
        else:
            assert torch.equal(found, before.tensor(path)), path


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_merged_folder_is_what_the_mixer_makes_to_the_bit_and_loads_in_diffusers(tmp_path, kind):
    base = tiny_folder(tmp_path / "a", kind)
    first, second = adapters(kind)
    parents = [
        Parent(one, weight, name, content=content_of(one))
        for one, weight, name in ((second, -0.4, "second"), (first, 0.7, "first"))
    ]
    merged(base, parents, tmp_path / "b")
    mixed = tiny_pipeline(kind)
    mixer = Mixer(mixed)
    mixer.add(first, "first")
    mixer.add(second, "second")
    mixer.set({"first": 0.7, "second": -0.4})
    loaded = components_of(load_pipeline(str(tmp_path / "b")))
    for component, module in components_of(mixed).items():
        state = loaded[component].state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(state[key], tensor), f"{component} {key}"


def test_a_merged_single_file_is_converted_by_diffusers_to_the_merged_folder(tmp_path):
    parts = components_of(tiny_pipeline("sdxl"))
    parent = Parent(adapters("sdxl")[0], 0.5)
    merged(tiny_folder(tmp_path / "a", "sdxl"), [parent], tmp_path / "b")
    merged(single_file(tmp_path / "a.safetensors", "sdxl"), [parent], tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    unet = convert_ldm_unet_checkpoint(dict(tensors), parts["unet"].config)
    for key, tensor in load_file(tmp_path / "b/unet/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(unet[key], tensor), key
    second = convert_open_clip_checkpoint(parts["text_encoder_2"], tensors, prefix="conditioner.embedders.1.model.")
    for key, tensor in load_file(tmp_path / "b/text_encoder_2/model.safetensors").items():
        assert torch.equal(second[key], tensor), key


def test_what_is_not_touched_keeps_its_bits_its_name_and_its_order(tmp_path):
    base = single_file(tmp_path / "a.safetensors", "sdxl", torch.float16)
    path = "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj"
    before_hash = hashes(base)
    parent = Parent(adapters("sdxl", suffix="layers.1.self_attn.k_proj")[0])
    report = merged(base, [parent], tmp_path / "b.safetensors")
    assert hashes(base) == before_hash
    assert path in report.changed and report.averaged == 1
    before, after = load_file(base), load_file(tmp_path / "b.safetensors")
    fused = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    clip = "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.k_proj.weight"
    differing = {key for key in before if not torch.equal(before[key], after[key])}
    assert differing == {fused, clip}
    assert all(before[key].dtype == after[key].dtype for key in before)
    rows = (before[fused] != after[fused]).any(dim=1)
    assert rows[32:64].all() and not rows[:32].any() and not rows[64:].any()
    with safe_open(base, "pt") as one, safe_open(tmp_path / "b.safetensors", "pt") as other:
        assert one.offset_keys() == other.offset_keys()


def test_the_metadata_is_kept_and_names_the_parents(tmp_path):
    base = single_file(tmp_path / "a.safetensors", "sd1")
    first, second = adapters("sd1", suffix="to_q")
    weights = {path: 0.5 if ".mid_block." in path else 1.0 for path in second.deltas}
    merged(base, [Parent(first, 0.3, "folder/one.safetensors", "ab12")], tmp_path / "b.safetensors")
    merged(tmp_path / "b.safetensors", [Parent(second, weights, "two.safetensors")], tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata.pop("sdlora.merged"))
    assert metadata == {"format": "pt", "modelspec.title": "tiny"}
    assert record[0] == {"name": "one.safetensors", "sha256": "ab12", "weights": {"unet": 0.3}}
    assert record[1]["name"] == "two.safetensors" and record[1]["weights"] == weights


def test_an_asked_dtype_holds_for_unet_and_text_encoders_and_leaves_the_rest(tmp_path):
    base = single_file(tmp_path / "a.safetensors", "sd1")
    parent = Parent(adapters("sd1", suffix="to_q")[0])
    merged(base, [parent], tmp_path / "b.safetensors", torch.float16)
    before, after = load_file(base), load_file(tmp_path / "b.safetensors")
    ours = ("model.diffusion_model.", "cond_stage_model.")
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        if key.startswith(ours):
            assert tensor.dtype == torch.float16
            assert "to_q" in key or torch.equal(tensor, before[key].half())
        else:
            assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])


def test_shards_stay_shards_and_the_index_tells_their_new_size(tmp_path):
    folder = tiny_folder(tmp_path / "a", "sd1")
    index = shard(folder)
    merged(folder, [Parent(adapters("sd1", suffix="to_q")[0])], tmp_path / "b", torch.float16)
    told, before = (json.loads((root / "unet" / index.name).read_text()) for root in (tmp_path / "b", folder))
    assert told["weight_map"] == before["weight_map"]
    assert told["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]
    load_pipeline(str(tmp_path / "b"))


def test_a_folder_keeps_its_other_files_and_no_second_unmerged_copy_of_its_weights(tmp_path):
    folder = tiny_folder(tmp_path / "a", "sd1")
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    save_file(
        {key: one.half() for key, one in tensors.items()}, folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    (folder / "v1-5-pruned.ckpt").write_bytes(b"a pickle")
    (folder / "README.md").write_text("a model")
    before = hashes(folder)
    parent = Parent(adapters("sd1", suffix="to_q")[0])
    report = merged(folder, [parent], tmp_path / "b")
    assert set(report.left_out) == {"unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.ckpt"}
    assert hashes(folder) == before
    there = {file.replace("/b/", "/a/"): told for file, told in hashes(tmp_path / "b").items()}
    assert before.keys() - there.keys() == {str(folder / name) for name in report.left_out}
    differing = {file for file in there if there[file] != before[file]}
    assert differing == {str(folder / "unet/diffusion_pytorch_model.safetensors")}


def test_tensors_are_read_and_written_one_at_a_time(tmp_path):
    base = single_file(tmp_path / "a.safetensors", "sd1")
    large = {f"first_stage_model.{i}": torch.randn(2**20) for i in range(12)}
    save_file(load_file(base) | large, base)
    model, parent = open_checkpoint(base), Parent(adapters("sd1", suffix="to_q")[0])
    tracemalloc.start()
    try:
        for _ in merge(model, [parent], tmp_path / "b.safetensors"):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * large["first_stage_model.0"].nbytes


def test_biases_and_norms_are_merged_too(tmp_path):
    deltas = {"unet.conv_in.bias": Full(torch.ones(16)), "unet.conv_norm_out": Full(torch.ones(16))}
    merged(tiny_folder(tmp_path / "a", "sd1"), [Parent(Adapter(deltas), 0.5)], tmp_path / "b")
    before, after = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    for path in deltas:
        assert torch.equal(after.tensor(path), before.tensor(path) + 0.5), path


def test_tokens_are_reported_and_weights_of_0_leave_out_what_does_not_fit(tmp_path):
    deltas = {
        QUERY: LowRank(torch.ones(2, 16), torch.ones(16, 2), 2.0),
        f"{QUERY}.bias": Full(torch.ones(16)),
        "unet.nowhere": Full(torch.ones(3, 3)),
    }
    adapter = Adapter(deltas, embeddings={"<zib>": {"text_encoder": torch.ones(1, 32)}})
    weights = {path: float(path == QUERY) for path in deltas}
    report = merged(tiny_folder(tmp_path / "a", "sd1"), [Parent(adapter, weights)], tmp_path / "b")
    assert report.changed == (QUERY,) and report.not_merged == ("<zib>",)


def bad_parent(kind: str) -> Parent:
    ones = LowRank(torch.ones(2, 16), torch.ones(16, 2), 2.0)
    deltas = {
        "bias": {f"{QUERY}.bias": Full(torch.ones(16))},
        "absent": {QUERY: ones, QUERY.replace("to_q", "to_p"): ones},
        "misfit": {QUERY: LowRank(torch.ones(2, 320), torch.ones(320, 2), 2.0)},
        "overflow": {QUERY: LowRank(torch.full((2, 16), 3e5), torch.ones(16, 2), 2.0)},
        "nan": {QUERY: LowRank(torch.full((2, 16), torch.nan), torch.ones(16, 2), 2.0)},
    }
    return Parent(
        Adapter(deltas.get(kind, {QUERY: ones})), {"nothing": 0.0, "weight": float("inf")}.get(kind, 1.0), "it"
    )


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bias", f"it adds a bias to 1 modules .* such as {QUERY}, .*give them the weight 0"),
        ("absent", r"lacks 1 of what it changes, such as .*to_p \(nearest: .*to_q"),
        ("misfit", f"does not fit .* in 1 places, such as {QUERY} .320x320, the model's is 16x16.; merge it into"),
        ("overflow", "to_q.weight .* would not be finite in float16; use smaller weights"),
        ("nan", "to_q: the mix overflows float32; use smaller weights"),
        ("nothing", "nothing to merge"),
        ("weight", "the weight inf is no finite number"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path, kind, message, single):
    base = single_file(tmp_path / "a.safetensors", "sd1") if single else tiny_folder(tmp_path / "a", "sd1")
    output = tmp_path / "made" / ("b.safetensors" if single else "b")
    output.parent.mkdir()
    before = hashes(base)
    with pytest.raises(SdloraError, match=message) as caught:
        merged(base, [bad_parent(kind)], output, torch.float16 if kind == "overflow" else None)
    assert "\n" not in str(caught.value)
    assert not list(output.parent.iterdir()) and hashes(base) == before


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_a_merge_that_is_left_early_leaves_nothing(tmp_path, single):
    base = single_file(tmp_path / "a.safetensors", "sd1") if single else tiny_folder(tmp_path / "a", "sd1")
    output = tmp_path / "made" / ("b.safetensors" if single else "b")
    work = merge(open_checkpoint(base), [Parent(adapters("sd1")[0])], output)
    for _ in range(5):
        next(work)
    assert list(output.parent.iterdir())
    work.close()
    assert not list(output.parent.iterdir())


def test_what_a_killed_merge_left_behind_is_in_nobodys_way(tmp_path):
    (tmp_path / ".b.partial/unet").mkdir(parents=True)
    (tmp_path / ".b.partial/unet/old").write_text("half")
    merged(tiny_folder(tmp_path / "a", "sd1"), [Parent(adapters("sd1", "to_q")[0])], tmp_path / "b")
    assert not (tmp_path / ".b.partial").exists() and not (tmp_path / "b/unet/old").exists()


def test_nothing_is_written_over_unless_it_is_asked_for(tmp_path):
    base, folder = single_file(tmp_path / "a.safetensors", "sd1"), tiny_folder(tmp_path / "a", "sd1")
    parent = Parent(adapters("sd1", suffix="to_q")[0])
    there = tmp_path / "b.safetensors"
    there.write_text("precious")
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("precious")
    for model, output, overwrite, message in [
        (base, there, False, "is there already; name another file"),
        (base, base, True, "where the base model lies"),
        (base, tmp_path / "b", False, "name a .safetensors"),
        (base, tmp_path, True, "where the base model lies"),
        (folder, full, True, "is there already and not empty"),
        (folder, folder / "merged", False, "where the base model lies"),
        (folder, tmp_path / "c.safetensors", False, "name a folder"),
        (base, there / "b.safetensors", False, "cannot be written"),
    ]:
        with pytest.raises(SdloraError, match=message):
            merged(model, [parent], output, overwrite=overwrite)
        assert there.read_text() == "precious" and [file.name for file in full.iterdir()] == ["precious"]
    merged(base, [parent], there, overwrite=True)
    assert open_checkpoint(there).single
    (tmp_path / "empty").mkdir()
    merged(folder, [parent], tmp_path / "empty")
    assert open_checkpoint(tmp_path / "empty").components
