"""Where LoRAs lie: what is found below a folder is what can be read, whatever its form."""

import os
from itertools import islice
from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.architectures import architecture_of
from sdlora.formats.read import read
from sdlora.formats.sources import CONFIG, WEIGHTS, files_of, loras_below, name_of, sources_of, split_path
from sdlora.formats.write import write
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

COMPONENTS = components_of(tiny_pipeline())


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "peft"])
def test_what_is_written_is_found_as_one_and_read(tmp_path: Path, naming: str):
    name = "style" if naming == "peft" else "style.safetensors"
    write(random_adapter(COMPONENTS, 0, suffix=("to_q", "q_proj")), tmp_path / "in" / name, naming)
    (found,) = loras_below(tmp_path)
    assert (name_of(found), name_of(found, tmp_path)) == ("style", "in/style")
    receipt = read(found, architecture_of(COMPONENTS))[1]
    assert set(receipt.components) == {"unet", "text_encoder"}
    assert {file.parent for file in files_of(found)} == {source.path.parent for source in sources_of(found)}
    assert len(files_of(found)) == (4 if naming == "peft" else 1)


def test_folders_of_components_hide_nothing_beside_them(tmp_path: Path):
    touched(tmp_path, f"unet/{WEIGHTS}", f"unet/{CONFIG}", f"zib/{WEIGHTS}", f"zib/{CONFIG}", "a.safetensors")
    touched(tmp_path, "model/unet/diffusion.safetensors", "model/unet/config.json")
    assert list(loras_below(tmp_path)) == [
        tmp_path,
        tmp_path / "a.safetensors",
        tmp_path / "model/unet/diffusion.safetensors",
        tmp_path / "zib",
    ]


def test_links_come_last_and_no_folder_is_looked_at_twice(tmp_path: Path):
    touched(tmp_path, "place/m/a.safetensors", "elsewhere/b.safetensors")
    for link, target in {"a": "m", "m/n": "../z", "m/round": "..", "out": "../elsewhere"}.items():
        (tmp_path / "place" / link).symlink_to(target)
    touched(tmp_path, "place/z/c.safetensors")
    own = [tmp_path / "place/m/a.safetensors", tmp_path / "place/z/c.safetensors"]
    assert [*islice(loras_below(tmp_path / "place"), 9)] == [*own, tmp_path / "place/out/b.safetensors"]
    assert [*islice(loras_below(tmp_path / "place", inside=True), 9)] == own


def test_folders_that_a_link_leads_out_to_are_not_even_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touched(tmp_path, "place/a.safetensors", "elsewhere/deep/b.safetensors")
    (tmp_path / "place/out").symlink_to("../elsewhere")
    (tmp_path / "again").symlink_to("place")
    (tmp_path / "place/round").symlink_to(".")
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert [*islice(loras_below(tmp_path / "again", inside=True), 9)] == [tmp_path / "again/a.safetensors"]
    assert not any("deep" in path for path in listed)


@pytest.mark.parametrize(
    ("names", "files"),
    [
        ([f"a/{WEIGHTS}", f"a/{CONFIG}"], None),
        ([f"a/b/{WEIGHTS}", f"a/b/{CONFIG}"], None),
        ([f"a/{part}/{name}" for part in ("text_encoder", "unet") for name in (WEIGHTS, CONFIG)], None),
        (["a/text_encoder-100.safetensors", "a/unet-100.safetensors"], None),
        (["a/style.safetensors"], ["a"]),
    ],
)
def test_the_files_of_a_lora_are_all_that_is_read_of_it(tmp_path: Path, names: list[str], files: list[str] | None):
    touched(tmp_path, *names, "a/note.txt")
    assert {str(file.relative_to(tmp_path)) for file in files_of(tmp_path / "a")} == set(files or names)


def test_a_folder_of_other_things_is_refused(tmp_path: Path):
    with pytest.raises(SdloraError, match="is no folder of one LoRA"):
        sources_of(touched(tmp_path, "style.safetensors"))


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("a.safetensors", "a.safetensors", ""),
        ("a.SAFETENSORS:0.8", "a.SAFETENSORS", ":0.8"),
        ("C:/x:y.safetensors:-1:0.5", "C:/x:y.safetensors", ":-1:0.5"),
        ("a.safetensors:blocks=IN:0.5", "a.safetensors", ":blocks=IN:0.5"),
        ("folder:0.8", "folder", ":0.8"),
        ("x:y", "x:y", ""),
        ("x:y:0.8:0.5", "x:y", ":0.8:0.5"),
        ("x:z:0.8", "x", ":z:0.8"),
        ("a.safetensors0.8", "a.safetensors", "0.8"),
        (":0.8", "", ":0.8"),
        ("", "", ""),
        ("a" * 5000 + ":1", "a" * 5000, ":1"),
    ],
)
def test_a_path_may_hold_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str, said: str):
    monkeypatch.chdir(touched(tmp_path, f"x:y/{CONFIG}"))
    assert split_path(text) == (path, said)
