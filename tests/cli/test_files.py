"""The verbs over files, each once from end to end: what they write is read again and held against float64 sums."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora import toybox
from sdlora.cli import main
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.formats.names import kohya
from sdlora.formats.read import read
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight, Plan
from sdlora.models.families import components_of
from sdlora.models.load import load_pipeline
from tests.conftest import random_adapter
from tests.tiny import tiny_folder

KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {KEY: (320, 768), MIDDLE: (1280, 1280), TEXT: (768, 768)}


def lora(path: Path, seed: int, rank: int = 4, alpha: float = 2.0, **metadata: str) -> dict[str, Tensor]:
    """Write a kohya file for SD 1.x; gives the changes by path, in float64."""
    generator = torch.Generator().manual_seed(seed)
    tensors, changes = {}, {}
    for module, (out, into) in SHAPES.items():
        down = torch.randn(rank, into, generator=generator)
        up = torch.randn(out, rank, generator=generator)
        name = kohya([module])[module]
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        changes[module] = up.double() @ down.double() * (alpha / rank)
    save_file(tensors, path, metadata)
    return changes


def change(path: Path, module: str) -> Tensor:
    return read(path)[0].deltas[module].weight(torch.zeros(SHAPES[module])).double()


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The changes of A.safetensors and B.safetensors, which lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    a = lora(tmp_path / "A.safetensors", 0, **{"modelspec.trigger_phrase": "sks", "ss_sd_model_name": "v1-5"})
    return a, lora(tmp_path / "B.safetensors", 1, rank=2, **{"modelspec.trigger_phrase": "zwx"})


def test_inspect_tells_norms_hashes_tags_and_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = json.dumps({"one": {"cat": 3, "dog": 1}, "two": {"cat": 2}})
    changes = lora(tmp_path / "a.safetensors", 0, ss_tag_frequency=tags, ss_sd_model_name="v1-5")
    main(["inspect", str(tmp_path / "a.safetensors"), "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["norms"] == pytest.approx({path: float(one.norm()) for path, one in changes.items()}, rel=1e-5)
    assert list(told["blocks"]) == ["IN01", "M00", "text_encoder"]
    assert told["blocks"]["M00"] == pytest.approx(float(changes[MIDDLE].norm()), rel=1e-5)
    assert told["tags"] == {"cat": 5, "dog": 1} and told["base_model"] == "v1-5" and told["finite"] and told["complete"]
    digest = subprocess.run(["sha256sum", tmp_path / "a.safetensors"], capture_output=True, text=True).stdout.split()[0]
    assert told["sha256"] == digest and told["autov2"] == digest[:10]
    assert told["applied"][KEY] == {"law": "lora", "rank": 4, "alpha": 2.0}
    main(["inspect", str(tmp_path / "a.safetensors")])
    text = capsys.readouterr().out
    assert digest in text and "SD 1.x" in text and "rank 4" in text and "alpha 2" in text
    bars = {line.split("  ")[2].strip(): line.count("█") for line in text.splitlines() if "█" in line}
    assert bars["M00"] == 40 and 0 < bars["IN01"] < 40
    assert "     5  cat" in text


def test_inspect_by_header_needs_no_torch(tmp_path: Path) -> None:
    lora(tmp_path / "a.safetensors", 0)
    code = "import sys; from sdlora.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "inspect", "--header", str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank 4" in done.stdout and "not looked at" in done.stdout and "norms" not in done.stdout


def test_inspect_shows_the_others_where_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora(tmp_path / "a.safetensors", 0)
    (tmp_path / "bad.safetensors").write_bytes(b"no LoRA")
    files = [str(tmp_path / "bad.safetensors"), str(tmp_path / "a.safetensors")]
    for flags in ([], ["--json"], ["--header"]):
        with pytest.raises(SystemExit) as exit:
            main(["inspect", *files, *flags])
        shown = capsys.readouterr()
        assert exit.value.code == 2
        assert len(shown.err.splitlines()) == 1 and "bad.safetensors" in shown.err
        assert "a.safetensors" in shown.out


def test_inspect_writes_out_what_a_terminal_would_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = json.dumps({"one": {"\x1b[2Jcat\u202e\r\n": 1}})
    path = tmp_path / "a\u202e.safetensors"
    lora(path, 0, ss_tag_frequency=tags, **{"modelspec.trigger_phrase": "a\x07b"})
    tensors = load_file(path)
    save_file(tensors | {"odd\u202ename": torch.ones(1)}, path)
    main(["inspect", str(path)])
    text = capsys.readouterr().out
    assert not any(one in text for one in "\x1b\u202e\r\x07")
    assert r"a\u202e.safetensors" in text and r"odd\u202ename" in text


def test_inspect_measures_what_depends_on_the_base_only_with_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = open_checkpoint(toybox.path())
    module = next(path for path in base.architecture.shapes if path.endswith("attn1.to_q"))
    name, width = kohya([module])[module], base.architecture.shapes[module][1]
    scale = torch.linspace(0, 1, width)
    save_file({f"{name}.weight": scale, f"{name}.on_input": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    main(["inspect", str(tmp_path / "a.safetensors"), "--json", "--base", "toybox"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["norms"] == pytest.approx({module: float((base.tensor(module).float() * scale).norm())}, rel=1e-5)
    main(["inspect", str(tmp_path / "a.safetensors"), "--json", "--base", "toybox", "--header"])
    assert not json.loads(capsys.readouterr().out)[0]["norms"]


def test_convert_keeps_the_numbers_and_the_metadata(pair, tmp_path: Path) -> None:
    main(["convert", "A.safetensors", "-o", "C.safetensors", "--naming", "diffusers", "--dtype", "float32"])
    adapter, receipt = read(tmp_path / "C.safetensors")
    assert f"{KEY}.lora_A.weight" in load_file(tmp_path / "C.safetensors")
    assert close(change(tmp_path / "C.safetensors", KEY), pair[0][KEY]) and receipt.base_model == "v1-5"


@pytest.mark.parametrize("verb", ["convert A.safetensors", "resize A.safetensors --rank 1", "blend A.safetensors"])
def test_a_folder_with_other_things_is_replaced_if_asked(pair, verb: str) -> None:
    Path("new").mkdir()
    Path("new/notes.txt").write_text("mine")
    main([*verb.split(), "-o", "new", "--naming", "peft", "--overwrite"])
    assert sorted(path.name for path in Path("new").iterdir()) == ["text_encoder", "unet"]


def test_blend_adds_with_weights_of_components_and_blocks(
    pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair
    line = "blend A.safetensors:0.8:0.5 B.safetensors:-0.5 --block A=unet.mid_block.*:0.5 -o C.safetensors"
    main(line.split())
    assert close(change(tmp_path / "C.safetensors", KEY), 0.8 * a[KEY] - 0.5 * b[KEY])
    assert close(change(tmp_path / "C.safetensors", MIDDLE), 0.4 * a[MIDDLE] - 0.5 * b[MIDDLE])
    assert close(change(tmp_path / "C.safetensors", TEXT), 0.5 * a[TEXT] - 0.5 * b[TEXT])
    adapter, receipt = read(tmp_path / "C.safetensors")
    assert receipt.ranks() == "rank 6" and receipt.trigger_words == ("sks", "zwx")
    record = json.loads(adapter.metadata["sdlora.blended"])
    assert [one["name"] for one in record["parents"]] == ["A.safetensors", "B.safetensors"]
    assert record["parents"][0]["sha256"] == read(tmp_path / "A.safetensors")[1].sha256
    assert record["parents"][0]["weights"] == {
        "unet": 0.8,
        "text_encoder": 0.5,
        "blocks": {"unet.mid_block.*": 0.5},
    }
    shown = capsys.readouterr().out
    assert KEY in shown and "3 parameters, ranks 6 to 6" in shown


def test_resize_over_its_own_source_keeps_the_largest_singular_values(pair, tmp_path: Path) -> None:
    main("resize A.safetensors --rank 2 -o A.safetensors --overwrite".split())
    left, values, right = torch.linalg.svd(pair[0][KEY], full_matrices=False)
    assert close(change(tmp_path / "A.safetensors", KEY), left[:, :2] * values[:2] @ right[:2])
    adapter, receipt = read(tmp_path / "A.safetensors")
    assert receipt.ranks() == "rank 2" and receipt.base_model == "v1-5"
    assert json.loads(adapter.metadata["sdlora.resized"])["keep"]["rank"] == 2


def test_what_is_merged_is_extracted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = open_checkpoint(toybox.path())
    module = next(path for path in base.architecture.shapes if path.endswith("attn1.to_q"))
    out, into = base.architecture.shapes[module]
    up, down = torch.randn(out, 2, generator=torch.manual_seed(0)), torch.randn(2, into, generator=torch.manual_seed(1))
    name = kohya([module])[module]
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
    merged, again = tmp_path / "merged", tmp_path / "again.safetensors"
    main(["merge", f"{tmp_path}/a.safetensors:0.5", "--base", "toybox", "--dtype", "float32", "-o", str(merged)])
    difference = open_checkpoint(merged).tensor(module).double() - base.tensor(module).double()
    assert close(difference, 0.5 * up.double() @ down.double())
    main(["extract", str(merged), "--base", "toybox", "--rank", "2", "-o", str(again)])
    adapter, receipt = read(again)
    assert list(adapter.deltas) == [module]
    assert close(adapter.deltas[module].weight(torch.zeros(out, into)).double(), 0.5 * up.double() @ down.double())
    assert "1 parameters changed" in capsys.readouterr().out


def twins(folder: Path, adapter: Adapter, model: Path) -> list[str]:
    """Two PEFT folders with the same weights and other alphas; in the order of their names the larger content leads."""
    unet = Adapter({path: delta for path, delta in adapter.deltas.items() if path.startswith("unet.")})
    write(unet, folder / "one", "peft")
    shutil.copytree(folder / "one", folder / "other")
    config = folder / "other/unet/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 3.0}))
    architecture = open_checkpoint(model).architecture
    contents = {path: read(path, architecture)[1].content for path in (folder / "one", folder / "other")}
    smaller, larger = sorted(contents, key=contents.__getitem__)
    return [str(larger.rename(folder / "a")), str(smaller.rename(folder / "b"))]


def copies(folder: Path, adapter: Adapter) -> list[str]:
    """One file twice; the names alone have another order than the whole paths."""
    files = [folder / "a/b.safetensors", folder / "b/a.safetensors"]
    for file in files:
        file.parent.mkdir()
    write(adapter, files[0])
    return [str(files[0]), str(shutil.copy(*files))]


@pytest.mark.parametrize("alike", ["weights", "files"])
def test_a_merge_adds_in_the_mixer_s_order_to_the_bit(
    alike: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_folder(tmp_path / "tiny", "sd1")
    pipeline = load_pipeline("tiny")
    adapter = random_adapter(components_of(pipeline), 1)
    files = twins(tmp_path, adapter, model) if alike == "weights" else copies(tmp_path, adapter)
    weights = dict(zip(files, (0.7, -0.43), strict=True))
    main(["merge", *(f"{file}:{weight}" for file, weight in weights.items()), "--base", "tiny", "-o", "merged"])
    loras = [LoraWeight(path=file, unet=weight, text_encoder=weight) for file, weight in weights.items()]
    Mixer(pipeline).hold(Plan("", tuple(loras)))
    again = components_of(load_pipeline("merged"))
    for component, module in components_of(pipeline).items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(again[component].state_dict()[key], tensor), f"{component} {key}"


@pytest.fixture
def half(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> str:
    """A.safetensors with a module that is not whole, one of three: too much to go unasked."""
    tensors = load_file("A.safetensors")
    del tensors[f"{kohya([MIDDLE])[MIDDLE]}.lora_up.weight"]
    save_file(tensors, "half.safetensors")
    return "half.safetensors"


VERBS = [
    ["convert", "half.safetensors", "--naming", "diffusers"],
    ["blend", "half.safetensors:0.5", "B.safetensors"],
    ["resize", "half.safetensors", "--rank", "1"],
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_what_a_verb_leaves_out_is_told_by_name(half: str, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb, "-o", "C.safetensors"])
    assert "--partial" in capsys.readouterr().err and not Path("C.safetensors").exists()
    main([*verb, "-o", "C.safetensors", "--partial"])
    told = capsys.readouterr().err
    assert f"NOT applied: 1 modules not whole: {kohya([MIDDLE])[MIDDLE]} lacks up" in told
    assert "in part as asked: 2 of" in told
    assert {KEY, TEXT} <= read(Path("C.safetensors"))[0].deltas.keys()


def test_a_whole_file_goes_without_a_note(pair: tuple[dict[str, Tensor], dict[str, Tensor]], capsys) -> None:
    main(["resize", "A.safetensors", "--rank", "1", "-o", "C.safetensors"])
    assert "note" not in capsys.readouterr().err


def test_what_is_left_out_is_counted_by_component(pair: tuple[dict[str, Tensor], dict[str, Tensor]], capsys) -> None:
    tensors = load_file("A.safetensors")
    del tensors[f"{kohya([TEXT])[TEXT]}.lora_up.weight"]
    tensors |= {f"lora_unet_nowhere.lora_{side}.weight": torch.ones(1, 1) for side in ("up", "down")}
    save_file(tensors, "half.safetensors")
    main(["inspect", "half.safetensors", "--partial", "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["left_out"] == {"unet": {"keys not known": 2}, "text_encoder": {"modules not whole": 1}}
    main(["inspect", "half.safetensors", "--partial"])
    assert "unet: 2 keys not known; text_encoder: 1 modules not whole" in capsys.readouterr().out


def test_changes_beyond_float32_are_told(pair: tuple[dict[str, Tensor], dict[str, Tensor]], capsys) -> None:
    tensors = load_file("A.safetensors")
    save_file(
        {key: value * 1e28 if "lora_" in key[-20:] else value for key, value in tensors.items()}, "big.safetensors"
    )
    main(["inspect", "big.safetensors"])
    assert "3 changes: numbers so large that float32 cannot hold the change" in capsys.readouterr().out


def test_a_blend_of_nothing_is_refused(pair: tuple[dict[str, Tensor], dict[str, Tensor]], capsys) -> None:
    with pytest.raises(SystemExit):
        main(["blend", "A.safetensors:0", "B.safetensors:0", "-o", "C.safetensors"])
    assert "all weights are 0" in capsys.readouterr().err and not Path("C.safetensors").exists()
