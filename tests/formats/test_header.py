"""What a .safetensors file says that it holds; every way in which it may lie gets one clear line."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import SdloraError
from sdlora.formats import header
from sdlora.formats.header import Spec, read_hashes, read_header, read_tensors

TENSORS = {
    "lora_unet_a.lora_down.weight": torch.arange(12.0).reshape(3, 4).half(),
    "lora_unet_a.lora_up.weight": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "lora_unet_a.alpha": torch.tensor(2.0),
    "empty": torch.empty(0, 4),
    "eight": torch.ones(3, dtype=torch.float8_e4m3fn),
}
ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def written(path: Path, head: bytes | str, body: bytes = b"", length: int | None = None, age: float = 60) -> Path:
    """A file with this header, whatever it says, that was last changed `age` seconds ago."""
    head = head.encode() if isinstance(head, str) else head
    path.write_bytes((len(head) if length is None else length).to_bytes(8, "little") + head + body)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", {"ss_output_name": "zib"})
    return tmp_path / "a.safetensors"


def test_a_header_tells_shapes_dtypes_and_metadata(lora):
    told = read_header(lora)
    assert told.metadata == {"ss_output_name": "zib"} and told.cut == ()
    assert told.tensors == {
        "lora_unet_a.lora_down.weight": Spec((3, 4), "F16"),
        "lora_unet_a.lora_up.weight": Spec((2, 3), "BF16"),
        "lora_unet_a.alpha": Spec((), "F32"),
        "empty": Spec((0, 4), "F32"),
        "eight": Spec((3,), "F8_E4M3"),
    }
    found = lora.stat()
    assert (told.path, told.size, told.modified) == (lora, found.st_size, found.st_mtime_ns)


def test_headers_and_hashes_are_read_without_torch(lora):
    code = (
        "import sys; from sdlora.formats.header import read_header, read_hashes; "
        f"read_header({str(lora)!r}); read_hashes({str(lora)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tensors_are_those_that_safetensors_reads(lora):
    tensors, _ = read_tensors(lora)
    expected = load_file(lora)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name].float(), tensor.float())


def test_tensors_need_not_be_aligned(tmp_path):
    entries = (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path = written(tmp_path / "a.safetensors", entries + " ", b"\7" + torch.tensor([1.5, -2]).numpy().tobytes())
    tensors, _ = read_tensors(path)
    assert tensors["a"].tolist() == [7] and tensors["b"].tolist() == [1.5, -2]


def test_only_the_tensors_asked_for_are_made(lora):
    assert read_tensors(lora, ["eight"])[0].keys() == {"eight"}
    with pytest.raises(SdloraError, match="has no tensor nine"):
        read_tensors(lora, ["nine"])


@pytest.mark.parametrize("chunk", [7, 64, header.CHUNK])
def test_hashes_are_of_the_whole_file_and_of_what_follows_the_header(lora, monkeypatch, chunk):
    monkeypatch.setattr(header, "CHUNK", chunk)
    content = lora.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    hashes = read_hashes(lora)
    assert hashes == read_tensors(lora)[1]
    assert hashes.sha256 == hashlib.sha256(content).hexdigest() and hashes.autov2 == hashes.sha256[:10]
    assert hashes.autov3 == hashlib.sha256(body).hexdigest() and hashes.autov3_short == hashes.autov3[:12]


def test_metadata_does_not_change_autov3(lora, tmp_path):
    save_file(TENSORS, tmp_path / "b.safetensors", {"ss_output_name": "another", "note": "x"})
    one, other = read_hashes(lora), read_hashes(tmp_path / "b.safetensors")
    assert one.autov3 == other.autov3 and one.sha256 != other.sha256


LIES = {
    "header longer than the file": (ENTRY, b"", 5000, "needs 5008 bytes, there are 56"),
    "header of 200 MB": (ENTRY, b"", 200_000_000, "would have 200000000 bytes"),
    "header of 2^63": (ENTRY, b"", 2**63, "would have"),
    "no header": ("", b"", None, "damaged or cut short"),
    "no object": ("[" * 100_000, b"", None, "damaged or cut short"),
    "deep": ('{"a":' + "[" * 100_000, b"", None, "recursion limit"),
    "text behind": (f'{{"a":{ENTRY}}}x', b"0" * 8, None, "trailing characters"),
    "no UTF-8": (b'{"\xff":' + ENTRY.encode() + b"}", b"0" * 8, None, "UTF-8"),
    "data missing": (f'{{"a":{ENTRY}}}', b"0" * 7, None, "more or fewer bytes"),
    "data too long": (f'{{"a":{ENTRY}}}', b"0" * 9, None, "more or fewer bytes"),
    "overlap": (f'{{"a":{ENTRY},"b":{ENTRY.replace("[0,8]", "[4,12]")}}}', b"0" * 12, None, "invalid offset"),
    "same place": (f'{{"a":{ENTRY},"b":{ENTRY}}}', b"0" * 8, None, "invalid offset"),
    "hole": (f'{{"a":{ENTRY},"b":{ENTRY.replace("[0,8]", "[12,20]")}}}', b"0" * 20, None, "invalid offset"),
    "backwards": (f'{{"a":{ENTRY.replace("[0,8]", "[8,0]")}}}', b"0" * 8, None, "invalid offset"),
    "unknown dtype": (f'{{"a":{ENTRY.replace("F32", "F33")}}}', b"0" * 8, None, "unknown variant `F33`"),
    "size": (f'{{"a":{ENTRY.replace("[2]", "[3]")}}}', b"0" * 8, None, "invalid shape"),
    "negative": (f'{{"a":{ENTRY.replace("[2]", "[-2]")}}}', b"0" * 8, None, "invalid value"),
    "overflow": (f'{{"a":{ENTRY.replace("[2]", f"[{2**62},{2**62}]")}}}', b"0" * 8, None, "overflow"),
    "told twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', b"0" * 8, None, "tells 1 tensors twice"),
    "line break": (f'{{"a\\nb":{ENTRY}}}', b"0" * 8, None, "named 'a.*nb'"),
    "long name": (f'{{"{"a" * 501}":{ENTRY}}}', b"0" * 8, None, "named 'aaa"),
    "many axes": (f'{{"a":{ENTRY.replace("[2]", "[2" + ",1" * 8 + "]")}}}', b"0" * 8, None, "has 9 axes"),
    "metadata that is no text": (f'{{"__metadata__":{{"x":1}},"a":{ENTRY}}}', b"0" * 8, None, "expected a string"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("read", [read_header, read_tensors])
def test_headers_that_lie_get_one_clear_line(tmp_path, lie, read):
    head, body, length, message = LIES[lie]
    path = written(tmp_path / "a.safetensors", head, body, length)
    with pytest.raises(SdloraError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "head",
    [
        "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(210_000)) + "}",
        '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(510_000)) + "}}",
        '{"a":{"dtype":"U8","shape":[0' + ",0" * 2_000_001 + '],"data_offsets":[0,0]}}',
    ],
    ids=["tensors", "metadata", "axes"],
)
def test_headers_that_only_cost_time_are_refused_before_they_are_parsed(tmp_path, head, monkeypatch):
    monkeypatch.delattr(header, "safe_open")
    with pytest.raises(SdloraError, match="more names than any model has"):
        read_header(written(tmp_path / "a.safetensors", head))


def test_a_tensor_may_be_named_like_a_word_of_the_header(tmp_path):
    save_file({"data_offsets": torch.ones(2)}, tmp_path / "a.safetensors", {"data_offsets": "data_offsets"})
    assert read_header(tmp_path / "a.safetensors").tensors == {"data_offsets": Spec((2,), "F32")}


def test_long_metadata_is_cut_and_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "LONGEST_TEXT", 10)
    save_file(TENSORS, tmp_path / "a.safetensors", {"cover": "x" * 11, "title": "y" * 10})
    told = read_header(tmp_path / "a.safetensors")
    assert told.metadata == {"cover": "x" * 10, "title": "y" * 10} and told.cut == ("cover",)


@pytest.mark.parametrize("ending", ["pt", "CKPT", "bin", "pth"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path, ending):
    with pytest.raises(SdloraError, match="is a pickle, which can run code.*save it as that"):
        read_header(tmp_path / f"a.{ending}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>log in</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00" + b"\0" * 40, "pickle of PyTorch under another name"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00alpha", "pickle under another name"),
        (b"", "is empty"),
        (b"abc", "damaged or cut short"),
    ],
)
def test_files_under_a_false_name_are_named(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    os.utime(tmp_path / "a.safetensors", (0, 0))
    with pytest.raises(SdloraError, match=message):
        read_header(tmp_path / "a.safetensors")


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, message in (
        ("absent.safetensors", "cannot be read .*check the path"),
        ("folder.safetensors", "is a folder or a device"),
        ("pipe.safetensors", "is a folder or a device"),
        ("a.txt", "is no .safetensors file"),
        ("a\0.safetensors", "cannot be read"),
    ):
        with pytest.raises(SdloraError, match=message):
            read_header(tmp_path / name)


def test_a_dtype_that_cannot_be_computed_with_is_named(tmp_path):
    head = '{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    with pytest.raises(SdloraError, match="a is in F8_E8M0, which is not read"):
        read_tensors(written(tmp_path / "a.safetensors", head, b"00"))


@pytest.mark.parametrize("read", [read_header, read_hashes, read_tensors])
def test_a_file_that_becomes_whole_in_time_is_read(lora, read):
    content, expected = lora.read_bytes(), read(lora)
    lora.write_bytes(content[: 30 if read is read_hashes else -1])
    thread = threading.Timer(0.1, lora.write_bytes, [content])
    thread.start()
    found = read(lora)
    thread.join()
    if read is read_header:
        assert found.tensors == expected.tensors
    else:
        assert (found if read is read_hashes else found[1]) == (expected if read is read_hashes else expected[1])


def test_a_file_that_keeps_growing_is_named_as_that(lora, monkeypatch):
    monkeypatch.setattr(header, "PATIENCE", 0.2)
    head = lora.read_bytes()[:-10]
    lora.write_bytes(head)
    done = threading.Event()

    def grow() -> None:
        while not done.wait(0.01):
            lora.write_bytes(head)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        with pytest.raises(SdloraError, match="is still being written; try again when it is done"):
            read_header(lora)
    finally:
        done.set()
        thread.join()


def test_a_file_that_changes_while_it_is_read_is_read_again(lora, monkeypatch):
    """Else the tensors would be of one content and the hashes of another."""
    honest, times = header._content, []

    def meanwhile(path, state, start):
        found = honest(path, state, start)
        if not times:
            save_file({"new": torch.ones(3)}, lora)
        times.append(state)
        return found

    monkeypatch.setattr(header, "_content", meanwhile)
    tensors, hashes = read_tensors(lora)
    assert len(times) == 2 and tensors.keys() == {"new"}
    assert hashes.sha256 == hashlib.sha256(lora.read_bytes()).hexdigest()


def test_a_giant_is_refused_before_it_is_read(tmp_path):
    size = header.LARGEST + 1
    head = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    path = written(tmp_path / "a.safetensors", head)
    os.truncate(path, 8 + len(head) + size)  # sparse: it takes no room
    assert read_header(path).tensors == {"a": Spec((size,), "U8")}
    with pytest.raises(SdloraError, match="has 16 GB; no LoRA has so much"):
        read_tensors(path)
