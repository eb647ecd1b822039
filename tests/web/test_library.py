"""The library gives out files it found itself, and no others."""

from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.web.library import Library, label


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


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    secret = _file(tmp_path / "elsewhere" / "secret.safetensors")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "link.safetensors").symlink_to(secret)
    assert Library([tmp_path / "library"]).entries == ()


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


def test_names_cannot_break_or_reverse_a_line() -> None:
    assert label("a\n\u202eb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"
