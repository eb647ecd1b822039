"""Files that are broken, absurd or made to harm: one clear line, little memory, and the mixer stays as it was."""

from __future__ import annotations

import json
import os
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.formats.architectures import sd1, sdxl
from sdlora.formats.names import kohya
from sdlora.formats.read import describe, read
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import CONFIG, WEIGHTS
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.formats.test_header import LIES, written
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 16x16 here
STEM = kohya([QUERY])[QUERY]
SGM = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
MEMORY = 300 * 2**20  # bytes that refusing a file may take; what the bombs here unfold to is gigabytes

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def shared_mixer(pipeline: Any) -> Mixer:
    mixer = Mixer(pipeline)
    mixer.add(random_adapter(components_of(pipeline), seed=1, suffix="to_k"), "good")
    return mixer


@pytest.fixture
def mixer(shared_mixer: Mixer) -> Iterator[Mixer]:
    """With an adapter in force already; what a test adds leaves with it."""
    shared_mixer.set({"good": 0.7})
    yield shared_mixer
    for name in set(shared_mixer.names) - {"good"}:
        shared_mixer.unload(name)


@pytest.fixture(scope="module")
def content(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file for the pipeline, 32 modules, rank 4 and alpha 2."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    write(random_adapter(components_of(pipeline), seed=0, suffix="to_q"), path)
    return path.read_bytes()


@pytest.fixture
def lora(content: bytes, tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_bytes(content)
    return tmp_path / "a.safetensors"


def refused(mixer: Mixer, path: Path, message: str, name: str | None = None) -> None:
    """Loading it gives one line and takes little memory; nothing is applied, nothing is lost."""
    before, names, weights = state_of(mixer.pipeline), mixer.names, mixer.weights
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SdloraError, match=message) as caught:
        mixer.load(path, name)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
    assert (mixer.names, mixer.weights) == (names, weights) and same_state(mixer.pipeline, before)


def changed(path: Path, change: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """The file with more tensors, or others."""
    save_file(load_file(path) | change, path, metadata)
    return path


# 1. Pickles


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['SDLORA_TRAP']}",)


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.safetensors"])
def test_pickles_are_not_opened_whatever_they_are_called(mixer, tmp_path, monkeypatch, form, name):
    monkeypatch.setenv("SDLORA_TRAP", str(tmp_path / "harm"))
    if form == "torch":
        torch.save({"a": Harmful()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Harmful(), 2))
    os.utime(tmp_path / name, (0, 0))
    refused(mixer, tmp_path / name, "pickle")
    assert not (tmp_path / "harm").exists()


def test_a_peft_folder_with_a_pickle_is_refused(mixer, tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    torch.save({}, tmp_path / "adapter_model.bin")
    refused(mixer, tmp_path, "cannot be read")


# 2 and 10. Headers that lie, files that are cut short or not yet whole


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_change_nothing(mixer, tmp_path, lie):
    head, body, length, message = LIES[lie]
    refused(mixer, written(tmp_path / "a.safetensors", head, body, length), message)


def test_a_file_cut_anywhere_is_refused(mixer, lora):
    content = lora.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, int.from_bytes(content[:8], "little") + 8, len(content) // 2, len(content) - 1):
        lora.write_bytes(content[:length])
        os.utime(lora, (0, 0))
        refused(mixer, lora, "damaged or cut short|is empty")


def test_a_file_is_read_when_it_is_whole(mixer, lora):
    content = lora.read_bytes()
    lora.write_bytes(content[:-100])
    thread = threading.Timer(0.1, lora.write_bytes, [content])
    thread.start()
    receipt = mixer.load(lora)
    thread.join()
    assert receipt.complete and receipt.size == len(content)


# 3. Metadata bombs

COVER = "data:image/png;base64," + "iVBORw0KGgo=" * 500_000


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_tag_frequency": "[" * 1_000 + "]" * 1_000},
        {"ss_tag_frequency": '{"a":' * 10_000 + "1" + "}" * 10_000},
        {"ss_tag_frequency": json.dumps({"a": {f"tag {i}": i for i in range(50_000)}})},
        {"ss_tag_frequency": '{"a": [1, 2]}', "ss_dataset_dirs": "[]", "ss_training_started_at": "abc"},
        {"ss_tag_frequency": '{"a": {"b": "c", "d": null}}', "ss_v2": "[]", "ss_base_model_version": "{}"},
        {"ss_tag_frequency": "1" * 100_000, "modelspec.trigger_phrase": " , ,"},
        {"modelspec.thumbnail": COVER, "ss_sd_model_name": COVER, "modelspec.trigger_phrase": COVER},
    ],
    ids=["deep list", "deep names", "many tags", "wrong types", "wrong types within", "long number", "covers"],
)
def test_metadata_does_not_keep_a_file_from_being_read(mixer, lora, metadata):
    changed(lora, {}, metadata)
    receipt = mixer.load(lora)
    assert receipt.complete and describe(lora).trigger_words == receipt.trigger_words
    assert len(receipt.summary()) < 10_000 and len(receipt.base_model) < 1_000
    assert sum(map(len, receipt.metadata.values())) <= sum(map(len, metadata.values()))
    assert all(name in " ".join(receipt.notes) for name in metadata if len(metadata[name]) > 5_000_000)


# 4. Numbers that are none, and numbers too large for the model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_numbers_that_are_none_are_refused(mixer, lora, dtype, value):
    up = torch.ones(16, 4)
    up[3, 2] = value
    refused(mixer, changed(lora, {f"{STEM}.lora_up.weight": up.to(dtype)}), f"{STEM}.*nan or infinite")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)])
def test_a_product_that_overflows_is_refused_and_leaves_the_model(lora, dtype, size):
    pipeline = tiny_pipeline().to(dtype)
    mixer, before = Mixer(pipeline), state_of(pipeline)
    factors = {
        f"{STEM}.lora_down.weight": torch.full((4, 16), size),
        f"{STEM}.lora_up.weight": torch.full((16, 4), size),
    }
    mixer.load(changed(lora, {key: value.to(dtype) for key, value in factors.items()}))
    with pytest.raises(SdloraError, match=f"{QUERY}: the mix overflows {str(dtype)[6:]}"):
        mixer.set({"a": 1.0})
    assert mixer.weights == {} and same_state(pipeline, before)


# 5. Factors that unfold to more than the model has, or to nothing


def low_rank(down: tuple[int, ...], up: tuple[int, ...]) -> Tensors:
    return {"lora_down.weight": torch.ones(down), "lora_up.weight": torch.ones(up)}


def hadamard(a: tuple[int, ...], b: tuple[int, ...]) -> Tensors:
    return {f"hada_w{i}_{name}": torch.ones(shape) for i in (1, 2) for name, shape in (("a", a), ("b", b))}


def kronecker(first: tuple[int, ...], second: tuple[int, ...]) -> Tensors:
    return {"lokr_w1": torch.ones(first), "lokr_w2": torch.ones(second)}


MISFITS: dict[str, Callable[[], Tensors]] = {
    "low rank of 10^10": lambda: low_rank((1, 100_000), (100_000, 1)),
    "hadamard of 10^10": lambda: hadamard((100_000, 1), (1, 100_000)),
    "kronecker of 10^12": lambda: kronecker((1_000, 1_000), (1_000, 1_000)),
    "kronecker of 15x15": lambda: kronecker((3, 3), (5, 5)),
    "kronecker turned": lambda: kronecker((4, 2), (2, 8)),
    "rotation of 12": lambda: {"oft_blocks": torch.zeros(3, 4, 4)},
    "rotation of 3000": lambda: {"oft_blocks": torch.zeros(1, 3_000, 3_000)},
    "rotation of nothing": lambda: {"oft_blocks": torch.zeros(0, 4, 4)},
    "butterfly of 24": lambda: {"oft_blocks": torch.zeros(1, 3, 8, 8)},
    "difference of another shape": lambda: {"diff": torch.zeros(16, 17)},
    "difference of nothing": lambda: {"diff": torch.zeros(0)},
    "norm that is a layer": lambda: {"w_norm": torch.zeros(16)},
    "scaling of 10^6": lambda: {"weight": torch.zeros(1_000_000), "on_input": torch.ones(())},
    "glora of 10^10": lambda: {
        "a1.weight": torch.zeros(100_000, 1),
        "a2.weight": torch.zeros(1, 100_000),
        "b1.weight": torch.zeros(100_000, 1),
        "b2.weight": torch.zeros(1, 100_000),
    },
    "magnitude of another width": lambda: low_rank((2, 16), (16, 2)) | {"dora_scale": torch.ones(17, 1)},
}
BROKEN: dict[str, Callable[[], Tensors]] = {
    "ranks that differ": lambda: low_rank((2, 16), (16, 3)),
    "single numbers": lambda: low_rank((), ()),
    "8 axes": lambda: low_rank((2, 16, 1, 1, 1, 1, 1, 1), (16, 2)),
    "hadamard that does not multiply": lambda: hadamard((16, 2), (3, 16)),
    "kronecker of vectors": lambda: kronecker((16,), (16,)),
    "kronecker of single numbers": lambda: kronecker((), ()),
    "rotation of a number": lambda: {"oft_blocks": torch.zeros(())},
    "rotation that is not square": lambda: {"oft_blocks": torch.zeros(4, 4, 5)},
    "difference of a number": lambda: {"diff": torch.zeros(())},
    "scaling by a number": lambda: {"weight": torch.zeros(()), "on_input": torch.ones(())},
    "half a pair": lambda: {"lora_down.weight": torch.ones(2, 16)},
    "the other half": lambda: {"lora_up.weight": torch.ones(16, 2)},
    "half a product": lambda: {"hada_w1_a": torch.ones(16, 2), "hada_w1_b": torch.ones(2, 16)},
}


@pytest.mark.parametrize("bomb", MISFITS)
def test_what_has_not_the_shape_of_its_module_is_never_multiplied(mixer, tmp_path, bomb):
    path = tmp_path / "a.safetensors"
    save_file({f"{STEM}.{part}": value for part, value in MISFITS[bomb]().items()}, path)
    refused(mixer, path, "was trained on another model|is a LoRA for|can only be applied in part")


def test_an_end_of_the_model_alone_must_fit_too(mixer, tmp_path):
    save_file({"lora_unet_conv_in.diff": torch.zeros(16, 9, 3, 3)}, tmp_path / "a.safetensors")
    refused(mixer, tmp_path / "a.safetensors", r"1 of its 1 modules cannot, such as lora_unet_conv_in \(16x9x3x3, the")


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_make_no_change_are_named(mixer, tmp_path, lora, case):
    parts = {f"{STEM}.{part}": value for part, value in BROKEN[case]().items()}
    save_file(parts, tmp_path / "alone.safetensors")
    refused(mixer, tmp_path / "alone.safetensors", STEM)
    whole = {key: value for key, value in load_file(lora).items() if not key.startswith(f"{STEM}.")}
    save_file(whole | parts, lora)
    receipt = mixer.load(lora)
    assert len(receipt.incomplete) == 1 and STEM in receipt.incomplete[0] and QUERY not in receipt.applied


def test_a_rank_far_above_the_modules_is_read_as_what_it_is(mixer, lora):
    """Absurd but true: its product is as small as any."""
    down, up = torch.full((100_000, 16), 1e-3), torch.full((16, 100_000), 1e-3)
    receipt = mixer.load(
        changed(
            lora, {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, f"{STEM}.alpha": torch.tensor(1e5)}
        )
    )
    assert receipt.applied[QUERY].rank == 100_000
    before = state_of(mixer.pipeline).weights[f"{QUERY}.weight"]
    mixer.set({"good": 0.7, "a": 1.0})
    change = state_of(mixer.pipeline).weights[f"{QUERY}.weight"] - before
    assert torch.allclose(change, torch.full((16, 16), 0.1), atol=1e-4)


# 6. Alphas


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "alpha is nan"),
        (torch.tensor(float("inf")), "alpha is inf"),
        (torch.tensor(1e30), "alpha is 1e.30, which no training gives"),
        (torch.tensor(-1e300, dtype=torch.float64), "which no training gives"),
        (torch.ones(2), "alpha is no single number"),
        (torch.ones(0), "alpha is no single number"),
        (torch.tensor(1 + 1j), "alpha is no single number"),
        (torch.tensor(float("nan"), dtype=torch.float8_e5m2), "alpha is nan"),
    ],
)
def test_alphas_that_make_no_sense_are_refused(mixer, lora, alpha, message):
    refused(mixer, changed(lora, {f"{STEM}.alpha": alpha}), message)


@pytest.mark.parametrize("alpha", [0.0, -2.0, 0.5, 300.0])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float16, ()), (torch.float32, (1,)), (torch.float64, (1, 1)), (torch.bfloat16, (1,))],
)
def test_alphas_are_numbers_in_any_dtype(lora, mixer, alpha, dtype, shape):
    changed(lora, {f"{STEM}.alpha": torch.full(shape, alpha, dtype=dtype)})
    adapter, receipt = read(lora, mixer.architecture)
    assert adapter.deltas[QUERY].alpha == receipt.applied[QUERY].alpha == alpha
    assert ("alpha is 0 in 1 modules" in " ".join(receipt.notes)) == (alpha == 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_alphas_may_be_whole_numbers_or_of_8_bits(lora, mixer, dtype):
    changed(lora, {f"{STEM}.alpha": torch.tensor(8).to(dtype)})
    adapter, _ = read(lora, mixer.architecture)
    assert adapter.deltas[QUERY].alpha == 8


# 7. One module told in two ways


@pytest.mark.parametrize(
    "parts",
    [
        {f"{STEM}.lora_A.weight": (4, 16), f"{STEM}.lora_B.weight": (16, 4)},
        {f"{SGM}.lora_down.weight": (4, 16), f"{SGM}.lora_up.weight": (16, 4)},
        {f"{QUERY}.lora.down.weight": (4, 16), f"{QUERY}.lora.up.weight": (16, 4)},
        {f"{STEM}.hada_w1_a": (16, 4)},
    ],
    ids=["other suffixes", "SGM's name", "diffusers' name", "another law"],
)
def test_a_module_that_is_told_in_two_ways_is_refused(mixer, lora, parts):
    path = changed(lora, {key: torch.ones(shape) for key, shape in parts.items()})
    refused(mixer, path, f"{STEM}.*delete")


# 8 and 9. Files for other models, and other files


def adapter_for(shapes: dict[str, tuple[int, ...]], part: str) -> Adapter:
    paths = [path for path in shapes if path.endswith("to_q") and part in path or part == path.partition(".")[0]]
    return Adapter(
        {path: LowRank(torch.ones(1, *shapes[path][1:]), torch.ones(shapes[path][0], 1), 1.0) for path in paths[:20]}
    )


@pytest.mark.parametrize("model", [sd1(), sdxl()], ids=["SD 1.x", "SDXL"])
def test_a_lora_for_another_model_is_refused_whole(mixer, tmp_path, model):
    write(adapter_for(dict(model.shapes), "down_blocks.1"), tmp_path / "a.safetensors")
    refused(mixer, tmp_path / "a.safetensors", f"is a LoRA for {model.label}.*choose a model that it was trained on")


def test_a_text_encoder_of_sd1_is_not_applied_to_sdxl_though_it_fits(tmp_path):
    path = tmp_path / "a.safetensors"
    encoder = adapter_for(dict(sd1().shapes), "text_encoder")
    unet = adapter_for(dict(sd1().shapes), "up_blocks.2")
    write(Adapter({**encoder.deltas, **unet.deltas}), path)
    with pytest.raises(SdloraError, match="is a LoRA for SD 1.x"):
        read(path, sdxl())
    adapter, receipt = read(path, sdxl(), partial=True)
    assert set(adapter.deltas) == set(encoder.deltas) and "in part as asked" in receipt.summary()
    write(encoder, path)
    changed(path, {}, {"ss_base_model_version": "sd_v1"})
    with pytest.raises(SdloraError, match="is a LoRA for SD 1.x"):
        read(path, sdxl())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.weight"], "is a whole"),
        (["decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"], "is a VAE"),
        (["emb_params"], "textual inversion"),
        (["320.0.linear1.weight", "320.1.linear1.weight"], "is a hypernetwork"),
        (["lora_controlnet", "input_blocks.1.0.in_layers.2.up"], "Control-LoRA"),
        (["lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight"], "ControlNet-LLLite"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "is a LoRA for Flux"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "is a LoRA for SD3"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "is a LoRA for Wan"),
        (["model.layers.0.self_attn.q_proj.weight"], "is a language model"),
        (["a", "b.c"], "holds nothing that can be applied as a LoRA: 2 keys such as a, b.c"),
    ],
)
def test_files_that_are_no_lora_for_stable_diffusion_are_called_what_they_are(mixer, tmp_path, keys, message):
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    refused(mixer, tmp_path / "a.safetensors", message)


# 11. The same name, other content


def sample(mixer: Mixer, name: str) -> Tensor:
    mixer.set({name: 1.0})
    return state_of(mixer.pipeline).weights[f"{QUERY}.weight"]


def test_new_content_under_the_same_name_is_seen(mixer, lora, pipeline):
    first = mixer.load(lora)
    before = sample(mixer, "a")
    write(random_adapter(components_of(pipeline), seed=5, suffix="to_q"), lora)
    second = mixer.load(lora)
    assert first.sha256 != second.sha256 and mixer.weights == {"a": {"unet": 1.0, "text_encoder": 1.0}}
    assert not torch.equal(sample(mixer, "a"), before)
    lora.write_bytes(lora.read_bytes()[:-10])
    os.utime(lora, (0, 0))
    refused(mixer, lora, "damaged or cut short")
    lora.unlink()
    refused(mixer, lora, "cannot be read")


@pytest.mark.parametrize("names", [("Style", "style"), ("caf\u00e9", "cafe\u0301"), ("a", "a\u200b"), ("\u0430", "a")])
def test_names_that_look_alike_are_two(mixer, tmp_path, names, pipeline):
    for seed, name in enumerate(names):
        write(random_adapter(components_of(pipeline), seed=seed, suffix="to_q"), tmp_path / f"{name}.safetensors")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system holds the two names for one")
    hashes = {mixer.load(tmp_path / f"{name}.safetensors").sha256 for name in names}
    assert len(hashes) == 2 and mixer.names == ("good", *names)
    assert not torch.equal(sample(mixer, names[0]), sample(mixer, names[1]))


# 12. Names of files


@pytest.mark.parametrize(
    "name",
    [
        "a=b:c>d,e",
        "\"q\" 'q'",
        "<lora:a:1>",
        "-rf",
        "--help",
        "\u202egpj.a",
        "\u0645\u0646",
        "%s{0}$HOME`id`",
        "x" * 243,
    ]
    + ["a.b.c", " ", "...", "\udcff\udcfe"],
)
def test_files_of_any_name_are_read(mixer, lora, name):
    path = lora.rename(lora.with_name(f"{name}.safetensors"))
    receipt: Receipt = mixer.load(path)
    assert receipt.complete and mixer.names == ("good", name)
    mixer.unload(name)
    path.write_bytes(b"<html>")
    os.utime(path, (0, 0))
    refused(mixer, path, "damaged")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\u2028b", "\x1b[2J", "a\x85b"])
def test_names_with_line_breaks_are_refused_in_one_line(mixer, lora, name):
    refused(mixer, lora.rename(lora.with_name(f"{name}.safetensors")), "has a line break or a control character in it")
    (lora.parent / name).mkdir()
    refused(mixer, lora.parent / name, "has a line break or a control character in it")


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "a", "no/such/folder", "", "a\0b"])
def test_paths_that_cannot_be_are_refused(mixer, tmp_path, name):
    for reader in (read, describe, lambda path: mixer.load(path, "a")):
        with pytest.raises(SdloraError) as caught:
            reader(tmp_path / f"{name}.safetensors")
        assert len(str(caught.value).splitlines()) == 1


# 25. What PEFT's settings could do


def peft_folder(folder: Path, **settings: Any) -> Path:
    inner = QUERY.removeprefix("unet.")
    factors = {"lora_A": torch.full((4, 16), 0.1), "lora_B": torch.full((16, 4), 0.1)}
    save_file({f"base_model.model.{inner}.{part}.weight": value for part, value in factors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}))
    return folder


SLOW_PATTERNS = [
    "(a+)+$",
    "(.*)*x",
    "(a|a)*b",
    "(([a-z])+.)+[A-Z]([a-z])+$",
    ".*.*.*.*.*x",
    r"(\w+\s?)*$",
    "(?:x+x+)+y",
    "(a?){99}b",
]


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_never_end_are_refused(mixer, tmp_path, lora, pattern, setting):
    refused(mixer, peft_folder(tmp_path, **{setting: {pattern: 4}}), "could take for ever to match")
    told = json.dumps({f"unet.{setting}": {pattern: 4}})
    refused(mixer, changed(lora, {}, {"lora_adapter_metadata": told}), "could take for ever to match")


def test_a_base_model_that_is_named_is_never_followed(mixer, tmp_path, monkeypatch):
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    trap = tmp_path / "base"
    os.mkfifo(trap)  # whoever opened it would wait for ever
    auto = {"base_model_class": "os.system", "parent_library": "os"}
    for base in (str(trap), "http://localhost/evil", "../../../etc/passwd"):
        peft_folder(tmp_path, base_model_name_or_path=base, auto_mapping=auto, revision="x")
        assert mixer.load(tmp_path, "a").complete


def test_whole_modules_beside_a_lora_are_put_in_place_and_looked_at(mixer, tmp_path):
    """PEFT's modules_to_save, and trained biases under either of their names."""
    peft_folder(tmp_path, modules_to_save=["conv_in"], bias="all")
    whole = {"conv_in.weight": torch.randn(16, 4, 3, 3), "conv_in.bias": torch.randn(16)}
    whole["mid_block.resnets.0.conv1.base_layer.bias"] = torch.randn(32)
    changed(tmp_path / WEIGHTS, {f"base_model.model.{name}": value for name, value in whole.items()})
    before = state_of(mixer.pipeline).weights
    assert mixer.load(tmp_path, "a").complete
    mixer.set({**mixer.weights, "a": 1.0})
    after = state_of(mixer.pipeline).weights
    for name, value in whole.items():
        torch.testing.assert_close(after[f"unet.{name.replace('.base_layer', '')}"], value)
    mixer.unload("a")
    assert all(torch.equal(state_of(mixer.pipeline).weights[name], value) for name, value in before.items())
    changed(tmp_path / WEIGHTS, {"base_model.model.conv_in.weight": torch.full((16, 4, 3, 3), float("nan"))})
    refused(mixer, tmp_path, "conv_in.set_weight holds numbers that are nan")
