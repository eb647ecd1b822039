"""Scanning a dataset folder: what is read, what is passed over, what is refused."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora.data.folder import scan
from sdlora.errors import SdloraError


def draw(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red", caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "avif", "JPG"])
def test_every_kind_of_picture_anywhere_below_is_found(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path / "deep" / "er" / f"one.{suffix}", caption="a\n red  square\n")
    (record,) = scan(tmp_path).records
    assert (record.name, record.caption) == (f"deep/er/one.{suffix}", "a red square")
    assert (record.width, record.height) == (40, 30)


def test_missing_and_empty_captions_fall_back_to_the_trigger_and_are_counted(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", caption="a house")
    draw(tmp_path / "b.png")
    draw(tmp_path / "c.png", caption=" \n")
    dataset = scan(tmp_path, trigger="sks")
    assert [record.caption for record in dataset.records] == ["a house", "sks", "sks"]
    assert dataset.receipt.fallbacks == ("b.png", "c.png")
    assert '2 without a caption use the trigger "sks": b.png, c.png' in dataset.summary()


def test_no_caption_and_no_trigger_names_the_files(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", caption="a house")
    draw(tmp_path / "b.png")
    with pytest.raises(SdloraError, match=r"1 pictures .* no caption: b\.png; .*--trigger"):
        scan(tmp_path)


def test_a_damaged_avif_is_skipped_like_any_other(tmp_path: Path) -> None:
    draw(tmp_path / "good.png", caption="x")
    whole = bytearray(draw(tmp_path / "bad.avif", (80, 60)).read_bytes())
    start = whole.index(b"mdat") + 8
    whole[start : start + 24] = bytes(24)
    (tmp_path / "bad.avif").write_bytes(whole)
    ((name, reason),) = scan(tmp_path, trigger="t").receipt.skipped
    assert name == "bad.avif" and "\n" not in reason


def test_a_folder_by_the_name_of_a_caption_is_one_line(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(SdloraError, match="caption .*a.txt cannot be read .*directory"):
        scan(tmp_path)


def test_unreadable_pictures_are_named_and_skipped(tmp_path: Path) -> None:
    draw(tmp_path / "good.png", caption="x")
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "empty.jpg").touch()
    whole = draw(tmp_path / "cut.jpg", (400, 300)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    draw(tmp_path / ".thumbs" / "hidden.png")
    dataset = scan(tmp_path)
    assert [record.name for record in dataset.records] == ["good.png"]
    reasons = dict(dataset.receipt.skipped)
    assert reasons.keys() == {"text.png", "empty.jpg", "cut.jpg", ".thumbs/hidden.png"}
    assert reasons["text.png"] == "cannot be read as a picture (no picture in it)"
    assert "truncated" in reasons["cut.jpg"]
    assert all(f"skipped {name}" in dataset.summary() for name in reasons)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("I am no picture")
    with pytest.raises(SdloraError, match=r"none of the 1 pictures .*text\.png"):
        scan(tmp_path)


def test_folders_that_cannot_be_scanned(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(SdloraError, match=r"no pictures in .*\.jpg"):
        scan(tmp_path)
    file = draw(tmp_path / "a.png")
    with pytest.raises(SdloraError, match="is a file"):
        scan(file)


def test_captions_that_are_not_text_or_belong_to_nothing(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", caption="x")
    (tmp_path / "lost.txt").write_text("who am I")
    assert scan(tmp_path).receipt.orphans == ("lost.txt",)
    picture.with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SdloraError, match=r"a\.txt is not UTF-8"):
        scan(tmp_path)


def test_exif_rotation_decides_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    (record,) = scan(tmp_path, "x").records
    assert (record.width, record.height) == (30, 40)
