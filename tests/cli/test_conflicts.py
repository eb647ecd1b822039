"""The verb that compares LoRAs: what it prints can be read, pasted and parsed; what is wrong is one line."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.cli import main
from sdlora.formats.names import kohya
from sdlora.workbench.conflicts import conflicts
from sdlora.workbench.parts import parse_part

KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SHAPES = {KEY: (320, 768), MIDDLE: (1280, 1280)}


def lora(path: Path, seed: int, size: float = 1.0, opposed: bool = False) -> Path:
    """A kohya file for SD 1.x. `opposed`: in the middle block, against the one of seed 0."""
    tensors = {}
    for module, (out, into) in SHAPES.items():
        against = opposed and module == MIDDLE
        generator = torch.Generator().manual_seed(0 if against else seed)
        name = kohya([module])[module]
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, into, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * (-size if against else size)
    save_file(tensors, path)
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two LoRAs in the working folder; the second is against the first in the middle, and 4 times as large."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lora(Path("A.safetensors"), 0)
    lora(Path("my B's.safetensors"), 1, 4.0, opposed=True)
    return ["A.safetensors", "my B's.safetensors"]


def test_it_prints_a_table_of_blocks_the_advice_and_weights_to_paste(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["conflicts", *files])
    found, text = conflicts(files), capsys.readouterr().out
    lines = text.splitlines()
    (head,) = [line for line in lines if line.startswith("block")]
    assert head.split() == ["block", "A", "|dW|", "B", "|dW|", "cosine", "columns", "rows"]
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("IN01", "M00", "all"))}
    for block in (*found.pairs[0].blocks, found.pairs[0].whole):
        told = [float(word) for word in rows[block.name]]
        assert told[:2] == pytest.approx(block.norms, rel=5e-3)
        assert told[2:] == pytest.approx([block.cosine, block.columns, block.rows], abs=6e-3)
    assert float(rows["M00"][2]) == -1
    assert found.pairs[0].advice in lines and "opposite sign" in text and "4 times as large" in text
    pasted = [parse_part(word) for word in shlex.split(lines[-1].removeprefix("of one size at: "))]
    assert [str(part.path) for part in pasted] == files
    assert found.equalised and [part.unet for part in pasted] == pytest.approx(found.equalised, rel=5e-3)


def test_json_tells_all_that_is_known(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["conflicts", *files, "--json"])
    told, found = json.loads(capsys.readouterr().out), conflicts(files)
    assert told == json.loads(json.dumps(found.as_dict()))
    assert [one["path"] for one in told["adapters"]] == files
    assert [one["equalised"] for one in told["adapters"]] == list(found.equalised or ())
    assert told["pairs"][0]["blocks"][1]["name"] == "M00" and told["pairs"][0]["advice"] == found.pairs[0].advice
    assert told["pairs"][0]["closest"]["parameter"] == MIDDLE
    assert told["pairs"][0]["closest"]["columns"] == pytest.approx([0, 0], abs=1e-3)


def test_a_picture_is_written_and_never_over_another(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["conflicts", *files, "--picture", "map.png"])
    assert capsys.readouterr().out.endswith("map.png\n")
    with Image.open("map.png") as image:
        assert image.format == "PNG"
    with pytest.raises(SystemExit) as exit:
        main(["conflicts", *files, "--picture", "map.png"])
    assert exit.value.code == 2 and "overwrite" in capsys.readouterr().err
    main(["conflicts", *files, "--picture", "map.png", "--overwrite"])


def test_sizes_against_a_base_are_remembered(
    files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = "unet.mid_block.attentions.0.proj_in"
    for seed, file in enumerate(files):
        generator = torch.Generator().manual_seed(seed)
        name = kohya([module])[module]
        factors = {"down": torch.randn(2, 160, generator=generator), "up": torch.randn(160, 2, generator=generator)}
        save_file({f"{name}.lora_{which}.weight": factor for which, factor in factors.items()}, file)
    texts = []
    for _ in range(2):
        main(["conflicts", *files, "--base", "toybox"])
        texts.append(capsys.readouterr().out)
        (remembered,) = json.loads((tmp_path / "cache" / "sdlora" / "norms.json").read_text())["files"].items()
        assert remembered[0].endswith(".safetensors") and list(remembered[1]["norms"]) == [module]
    assert texts[0] == texts[1] and "|dW|/|W|" in texts[0] and "of |W|" in texts[0]


def test_names_from_files_cannot_command_a_terminal(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    odd = lora(Path("a\u202eb.safetensors"), 2)
    main(["conflicts", files[0], str(odd), "--picture", "map.png"])
    text = capsys.readouterr().out
    assert "\u202e" not in text and r"\u202e" in text


WRONG = {
    "": ["two files"],
    "A.safetensors": ["two files"],
    "A.safetensors missing.safetensors": ["missing.safetensors", "No such file"],
    "A.safetensors xl.safetensors": ["A.safetensors is for SD 1.x", "xl.safetensors is for SDXL", "2048"],
    "A.safetensors A.safetensors --base no-such-model": ["no-such-model"],
    "A.safetensors A.safetensors --base toybox": ["A.safetensors", "SD 1.x"],
    "A.safetensors A.safetensors --picture map.jpg": ["map.jpg", ".png"],
    "A.safetensors A.safetensors --picture nowhere/map.png": ["nowhere", "folder"],
    "A.safetensors A.safetensors --pictur map.png": ["--pictur"],
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    line: str, files: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{name}.lora_up.weight": torch.ones(640, 1), f"{name}.lora_down.weight": torch.ones(1, 2048)},
        "xl.safetensors",
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main(["conflicts", *line.split()])
    told = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(told) == 1 and told[0].startswith("sdlora: ") and all(word in told[0] for word in WRONG[line]), told
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_files_are_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from sdlora.cli import main\n"
        "try: main(['conflicts'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
