"""The library gives out files it found itself, and no others."""

import os
import re
from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.block_weights import PRESET_FILE, PRESETS, Factors, read_factors, write_factors
from sdlora.web.library import Library, label

HALF = PRESETS["ALL0.5"]


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_finished_files_below_the_folder_are_offered(tmp_path: Path) -> None:
    _file(tmp_path / "run" / "style.safetensors")
    _file(tmp_path / "zib.safetensors")
    for other in ("model.ckpt", ".style.safetensors.partial", ".hidden/a.safetensors", ".b.safetensors"):
        _file(tmp_path / other)
    library = Library([tmp_path])
    assert [entry.label for entry in library.entries] == ["run/style", "zib"]
    assert library.path(library.entries[1].id) == tmp_path / "zib.safetensors"


def test_what_two_folders_have_under_one_name_is_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        _file(tmp_path / folder / "style.safetensors")
    library = Library([tmp_path / "one", tmp_path / "two"])
    assert [entry.label for entry in library.entries] == ["one/style", "two/style"]
    assert library.names["two/style"] == tmp_path / "two" / "style.safetensors"


def test_a_folder_of_peft_is_one_lora(tmp_path: Path) -> None:
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        _file(tmp_path / "library" / "v1.5" / file)
    library = Library([tmp_path / "library"])
    (entry,) = library.entries
    assert (entry.label, entry.path) == ("v1.5", tmp_path / "library" / "v1.5")
    assert library.names["v1.5"] == entry.path
    config = tmp_path / "library" / "v1.5" / "adapter_config.json"
    config.rename(tmp_path / "config.json")
    config.symlink_to(tmp_path / "config.json")
    assert library.scan() == (), "a link leads out of the library"


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = _file(tmp_path / "elsewhere" / "deep" / "secret.safetensors")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "link.safetensors").symlink_to(secret)
    (tmp_path / "library" / "link").symlink_to(tmp_path / "elsewhere")
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert Library([tmp_path / "library"]).entries == ()
    assert listed and not any("deep" in path for path in listed), "what is dropped anyway is not walked"


@pytest.mark.parametrize("id", ["", "../secret", "/etc/passwd", "0123456789abcdef"])
def test_only_its_own_ids_lead_to_files(tmp_path: Path, id: str) -> None:
    with pytest.raises(SdloraError, match="not in the library"):
        Library([tmp_path]).path(id)


def test_uploads_are_safetensors_only(tmp_path: Path) -> None:
    library = Library([tmp_path])
    with pytest.raises(SdloraError, match="no .safetensors file"):
        library.upload(_file(tmp_path / "a.ckpt"))
    entry = library.upload(_file(tmp_path / "uploads" / "b.safetensors"))
    assert library.entries[0] == entry


def test_a_library_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="nowhere is no folder"):
        Library([tmp_path / "nowhere"])


def test_presets_of_all_folders_are_offered_beside_the_built_in_ones(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / PRESET_FILE).write_text(f"of {name}:{HALF}\n")
    library = Library([tmp_path / "a", tmp_path / "b"])
    assert library.presets == {**PRESETS, "of a": HALF, "of b": HALF}


def test_a_preset_is_saved_and_all_else_in_the_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / PRESET_FILE
    library = Library([tmp_path])
    library.save_preset(" mine ", (("IN04", 0.5),))
    assert file.read_text() == f"mine:{write_factors((('IN04', 0.5),))}\n"
    others = f"# lists of people\r\nmine, too:{HALF}\r\n\r\nlast:{HALF}"
    file.write_bytes(f"mine:{HALF}\r\n{others}".encode())
    library.save_preset("mine", (("OUT03", 0.0),))
    assert file.read_bytes().decode() == f"{others}\nmine:{write_factors((('OUT03', 0.0),))}\n"
    assert read_factors("mine", library.presets) == (("OUT03", 0.0),)
    assert Library([tmp_path]).presets == library.presets
    assert [path.name for path in tmp_path.iterdir()] == [PRESET_FILE]


@pytest.mark.parametrize(
    "name, factors, told",
    [
        ("", (("IN04", 0.5),), "no name of a preset"),
        ("a:b", (("IN04", 0.5),), "without : #"),
        ("#a", (("IN04", 0.5),), "without : #"),
        ("0.5", (("IN04", 0.5),), "is a number"),
        ("a\nb", (("IN04", 0.5),), "no name of a preset"),
        ("INS", (("IN04", 0.5),), "there is a preset INS already"),
        ("theirs", (("IN04", 0.5),), "there is a preset theirs already"),
        ("mine", (), "all blocks have the factor 1"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(tmp_path: Path, name: str, factors: Factors, told: str) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "b" / PRESET_FILE).write_text(f"theirs:{HALF}\n")
    library = Library([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(SdloraError, match=told):
        library.save_preset(name, factors)
    assert not (tmp_path / "a" / PRESET_FILE).exists()


def test_links_inside_the_folder_take_no_names_away(tmp_path: Path) -> None:
    _file(tmp_path / "z" / "flat.safetensors")
    (tmp_path / "a").symlink_to("z")
    assert [entry.label for entry in Library([tmp_path]).entries] == ["z/flat"]


def test_presets_that_cannot_be_read_keep_no_library_from_being_made(tmp_path: Path) -> None:
    _file(tmp_path / "style.safetensors")
    assert Library([tmp_path]).problem == ""
    (tmp_path / PRESET_FILE).write_text("broken\n")
    library = Library([tmp_path])
    assert f"{tmp_path / PRESET_FILE}, line 1" in library.problem
    assert library.presets == PRESETS and library.names["style"] == tmp_path / "style.safetensors"


@pytest.mark.parametrize(("held", "why"), [(b"mine:1,0\n", ", line 1"), (b"mine\xff:1,0\n", " cannot be read")])
def test_presets_that_cannot_be_read_are_told_and_never_written_over(tmp_path: Path, held: bytes, why: str) -> None:
    library = Library([tmp_path])
    _file(tmp_path / "style.safetensors")
    (tmp_path / PRESET_FILE).write_bytes(held)
    told = re.escape(f"{tmp_path / PRESET_FILE}{why}")
    with pytest.raises(SdloraError, match=told):
        library.scan()
    assert [entry.label for entry in library.entries] == ["style"], "LoRAs are found all the same"
    assert library.presets == PRESETS
    with pytest.raises(SdloraError, match=told):
        library.save_preset("mine", (("IN04", 0.5),))
    assert (tmp_path / PRESET_FILE).read_bytes() == held


def test_names_cannot_break_or_reverse_a_line() -> None:
    assert label("a\n\u202eb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"
