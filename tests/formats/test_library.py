"""A scan describes what lies below folders, as `describe` would, and looks again only at what has changed."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import SdloraError
from sdlora.formats import layouts, library
from sdlora.formats.library import Described, scan
from sdlora.formats.read import describe

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
OLD = 1_700_000_000


def lora(path: Path, rank: int = 4, width: int = 768, **metadata: str) -> Path:
    """A file with one module, as if written long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{STEM}.lora_down.weight": torch.ones(rank, width),
        f"{STEM}.lora_up.weight": torch.ones(320, rank),
        f"{STEM}.alpha": torch.tensor(float(rank)),
    }
    save_file(tensors, path, metadata)
    os.utime(path, (OLD, OLD))
    return path


def peft(folder: Path) -> Path:
    folder.mkdir(parents=True)
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 768), f"{name}.lora_B.weight": torch.ones(320, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


def test_files_and_peft_folders_are_found_and_described(tmp_path: Path) -> None:
    lora(tmp_path / "a" / "one.safetensors", ss_sd_model_name="v1-5.safetensors", **{"modelspec.trigger_phrase": "sks"})
    lora(tmp_path / ".hidden" / "two.safetensors")
    lora(tmp_path / ".three.safetensors")
    peft(tmp_path / "b" / "adapter")
    (tmp_path / "c.safetensors").write_bytes(b"no LoRA at all")
    file, folder, wrong = scan([tmp_path])
    assert (file.path, file.made_for, file.ranks) == (tmp_path / "a" / "one.safetensors", ("sd1",), "rank 4")
    assert (file.components, file.laws, file.trigger_words) == ({"unet": 1}, {"lora": 1}, ("sks",))
    assert file.base_model == "v1-5.safetensors" and not file.problem
    assert (folder.path, folder.made_for, folder.ranks) == (tmp_path / "b" / "adapter", ("sd1",), "rank 2")
    assert wrong.path.name == "c.safetensors" and "damaged" in wrong.problem


def test_files_of_one_layout_differ_in_all_that_their_metadata_tell(tmp_path: Path) -> None:
    """Such headers are parsed once; what is told of each file must not notice."""
    tags = json.dumps({"folder": {"cat": 9, "dog": 8}})
    lora(tmp_path / "a.safetensors", ss_tag_frequency=tags, ss_sd_model_name="one")
    lora(tmp_path / "b.safetensors", ss_sd_model_name='two \N{SNOWMAN} \\ "data_offsets"')
    lora(tmp_path / "c.safetensors", width=1024, ss_sd_model_name="three")
    found = scan([tmp_path])
    for one in found:
        receipt = describe(one.path)
        assert (one.made_for, one.base_model) == (receipt.made_for, receipt.base_model)
        assert (one.trigger_words, one.ranks) == (receipt.trigger_words, receipt.ranks())
    assert [one.made_for for one in found] == [("sd1",), ("sd1",), ("sd2",)]
    assert [one.trigger_words for one in found] == [("cat", "dog"), (), ()]


def test_more_layouts_than_are_remembered_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MOST", 2)
    ranks = [1, 2, 1, 3, 4, 1, 2, 5, 5, 3]
    for i, rank in enumerate(ranks):
        lora(tmp_path / f"{i}.safetensors", rank=rank)
    assert [one.ranks for one in scan([tmp_path])] == [f"rank {rank}" for rank in ranks]


def test_a_name_that_cannot_be_shown_is_refused_whatever_the_layout(tmp_path: Path) -> None:
    lora(tmp_path / "a.safetensors")
    lora(tmp_path / "b\n.safetensors")
    assert [bool(one.problem) for one in scan([tmp_path])] == [False, True]


def test_a_file_that_is_cut_short_is_not_taken_for_its_whole_sister(tmp_path: Path) -> None:
    lora(tmp_path / "a.safetensors")
    short = lora(tmp_path / "b.safetensors")
    short.write_bytes(short.read_bytes()[:-100])
    os.utime(short, (OLD, OLD))
    whole, cut = scan([tmp_path])
    assert not whole.problem and "damaged or cut short" in cut.problem


def test_only_what_changed_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "library.json"
    first, second = lora(tmp_path / "l" / "a.safetensors"), lora(tmp_path / "l" / "b.safetensors")
    (tmp_path / "l" / "c.safetensors").write_bytes(b"no LoRA")
    os.utime(tmp_path / "l" / "c.safetensors", (OLD, OLD))
    looked: list[Path] = []

    def watched(path: Path, *how: object):
        looked.append(path)
        return describe(path, *how)

    monkeypatch.setattr(library, "describe", watched)
    before = scan([tmp_path / "l"], cache)
    assert len(looked) == 3
    assert scan([tmp_path / "l"], cache) == before and len(looked) == 3
    lora(second, rank=8)
    os.utime(second, (OLD + 1, OLD + 1))
    third = lora(tmp_path / "l" / "d.safetensors")
    after = scan([tmp_path / "l"], cache)
    assert looked[3:] == [second, third]
    assert [one.ranks for one in after] == ["rank 4", "rank 8", "", "rank 4"]
    first.unlink()
    assert len(scan([tmp_path / "l"], cache)) == 3 and len(looked) == 5
    assert str(first) not in cache.read_text()


def test_another_folder_does_not_push_the_first_out_of_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "library.json"
    first, second = lora(tmp_path / "one" / "a.safetensors"), lora(tmp_path / "two" / "a.safetensors")
    scan([first.parent], cache)
    scan([second.parent], cache)
    assert json.loads(cache.read_text())["found"].keys() == {str(first), str(second)}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": "FORMAT", "found": {"PATH": {"size": ""}}}']
)
def test_a_damaged_cache_is_thrown_away(text: str, tmp_path: Path) -> None:
    cache = tmp_path / "library.json"
    file = lora(tmp_path / "l" / "a.safetensors")
    cache.write_text(text.replace("FORMAT", library.FORMAT).replace("PATH", str(file)))
    found = scan([file.parent], cache)
    assert [one.ranks for one in found] == ["rank 4"]
    assert json.loads(cache.read_text())["format"] == library.FORMAT
    assert scan([file.parent], cache) == found


def test_the_cache_gives_back_all_that_it_was_given(tmp_path: Path) -> None:
    cache = tmp_path / "library.json"
    one = Described(
        tmp_path / "x",
        1,
        2,
        "why",
        ("sd1",),
        {"unet": 1},
        {"lora": 1},
        "rank 1",
        "b",
        ("t",),
        ("k",),
        ("F16",),
        1,
        2,
        3,
    )
    assert all(asdict(one).values()), "every field is tried"
    library._save(cache, {str(one.path): one})
    assert library._load(cache) == {str(one.path): one}


def test_what_is_wrong_with_a_young_file_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "l" / "a.pt.safetensors"
    file.parent.mkdir()
    file.write_text("<!doctype html> and so on, for long enough")
    assert scan([file.parent], tmp_path / "library.json")[0].problem
    assert str(file) not in ((tmp_path / "library.json").read_text() if (tmp_path / "library.json").exists() else "")


def test_what_is_wrong_with_a_young_folder_is_not_remembered(tmp_path: Path) -> None:
    folder = peft(tmp_path / "l" / "a")
    (folder / "adapter_config.json").write_text("{")
    assert scan([tmp_path / "l"], tmp_path / "library.json")[0].problem
    assert not (tmp_path / "library.json").exists()


def test_a_scan_goes_on_where_the_cache_cannot_be_written(tmp_path: Path) -> None:
    lora(tmp_path / "l" / "a.safetensors")
    (tmp_path / "file").write_text("in the way")
    assert len(scan([tmp_path / "l"], tmp_path / "file" / "library.json")) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="nowhere is no folder"):
        scan([tmp_path / "nowhere"])
