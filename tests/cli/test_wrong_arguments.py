"""What a person gets wrong is answered by one line on stderr that says what to mend, and exit code 2."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.cli import main
from tests.tiny import tiny_folder

# command line ▶ words that the answer must hold
WRONG = {
    "trian": ["trian", "train"],
    "train": ["no dataset"],
    "train no-such-folder": ["no-such-folder"],
    "train pictures extra": ["'extra'"],
    "train pictures --learning-rat 1": ["--learning-rat", "--learning-rate"],
    "train pictures --learning-rate abc": ["--learning-rate", "abc"],
    "train pictures --learning-rate nan": ["learning_rate", "nan"],
    "train pictures --learning-rate": ["--learning-rate"],
    "train pictures --rank 0": ["rank", "at least 1"],
    "train pictures --rank 1.5": ["--rank", "1.5"],
    "train pictures --steps 5 --epochs 2": ["steps", "epochs"],
    "train pictures --optimizer adamv": ["optimizer", "adamw"],
    "train pictures --config missing.toml": ["missing.toml"],
    "train pictures --config broken.toml": ["broken.toml", "TOML"],
    "train pictures --config typo.toml": ["typo.toml", "ranke", "rank"],
    "train empty": ["empty"],
    "train pictures --model no-such-model": ["no-such-model"],
    "train pictures --model hollow": ["hollow", "model_index.json"],
    "train texts": ["texts"],
    "train " + "x" * 5000: ["does not exist"],
    "train pictures --output pictures/a.png/run": ["pictures/a.png", "is a file"],
    "train pictures --output pictures/run": ["pictures/run", "lies in the dataset"],
    "train pictures --tracker wandb": ["wandb", "pip install"],
    "generate": ["prompt"],
    "generate cat dog": ["'dog'"],
    "generate cat --lora a.safetensors:abc": ["a.safetensors", "'abc'", "weight"],
    "generate cat --lora a.safetensors:nan": ["a.safetensors", "nan"],
    "generate cat --lora a.safetensors:1:2:3": ["a.safetensors:1:2:3"],
    "generate cat --lora a.safetensors:tee=1": ["tee=", "te"],
    "generate cat --lora a.safetensors:0.5:unet=1": ["unet=", "once"],
    "generate cat --lora a.safetensors:blocks=INSS": ["INSS", "INS"],
    "generate cat --lora a.safetensors:schedule=later": ["later", "0.2-0.8"],
    "generate cat --compose sun": ["sun", "sum"],
    "generate cat --switch-every 0": ["switch_every", "0"],
    "generate cat --ladder 0,1": ["ladder", "--lora"],
    "generate cat --ladder 0,one --lora short.safetensors": ["0,one", "0,0.25,0.5"],
    "generate cat --grid 0,1 --lora short.safetensors": ["--grid", "--ladder"],
    "generate <lora:nobody:1>": ["<lora:nobody:1>", "nobody"],
    "generate <lora:nobody:much>": ["<lora:nobody:much>", "much"],
    "generate cat --negative-prompt <lora:nobody>": ["<lora:nobody>", "prompt"],
    "generate cat --library no-such-folder": ["no-such-folder"],
    "generate cat --seed abc": ["--seed", "abc"],
    "generate cat --seed -1": ["seed", "-1"],
    "generate cat --seed 9223372036854775807 --count 2": ["seed", "2 seeds"],
    "generate cat --steps 0": ["steps", "0"],
    "generate cat --guidance inf": ["guidance scale", "inf"],
    "generate cat --scheduler eulr": ["eulr", "euler"],
    "generate cat --size 100": ["100", "multiple of 8"],
    "generate cat --size big": ["big", "512x768"],
    "generate cat --count 0": ["count", "0"],
    "generate cat --model no-such-model": ["no-such-model"],
    "generate cat --model hollow": ["hollow", "model_index.json"],
    "generate cat --model weightless": ["weightless", "cannot be loaded"],
    "generate cat --model tiny --output pictures/a.png": ["a.png", "is a file"],
    "generate cat --model tiny --lora missing.safetensors:0.5": ["missing.safetensors"],
    "generate cat --model tiny --lora notes:from:me.safetensors:0.5": ["notes:from:me.safetensors"],
    "generate cat --model tiny --lora short.safetensors": ["short.safetensors"],
    "app --library no-such-folder": ["no-such-folder"],
    "app --host 0.0.0.0": ["0.0.0.0", "password"],
    "app --library " + "x" * 5000: ["is no folder"],
    "app --model no-such-model": ["no-such-model"],
    "app --port abc": ["--port", "abc"],
    "app --port 99999": ["99999", "65535"],
    "inspect": ["no LoRA", "name"],
    "inspect missing.safetensors": ["missing.safetensors"],
    "inspect short.safetensors --header": ["short.safetensors"],
    "inspect lora.safetensors --base no-such-model": ["no-such-model"],
    "inspect lora.safetensors --base tiny": ["lora.safetensors", "SD 1.x"],
    "convert": ["file"],
    "convert lora.safetensors": ["-o"],
    "convert lora.safetensors -o lora.safetensors": ["lora.safetensors", "overwrite"],
    "convert lora.safetensors -o new.safetensors --naming koyha": ["koyha", "kohya"],
    "convert lora.safetensors -o new.safetensors --dtype float61": ["float61", "float16"],
    "convert lora.safetensors -o new.safetensors --naming peft": ["new.safetensors", "folder"],
    "convert lora.safetensors -o new --naming diffusers": ["new", ".safetensors"],
    "convert lora.safetensors -o new.safetensors --rank 4": ["--rank", "--to-lora"],
    "convert missing.safetensors -o new.safetensors": ["missing.safetensors"],
    "blend": ["-o"],
    "blend -o new.safetensors": ["no LoRA"],
    "blend lora.safetensors:abc -o new.safetensors": ["'abc'", "weight"],
    "blend lora.safetensors:nan -o new.safetensors": ["'nan'", "weight"],
    "blend lora.safetensors:1:2:3 -o new.safetensors": ["lora.safetensors:1:2:3"],
    "blend lora.safetensors -o lora.safetensors": ["lora.safetensors", "overwrite"],
    "blend lora.safetensors -o new.safetensors --method tyes": ["tyes", "ties"],
    "blend lora.safetensors -o new.safetensors --density 0": ["density", "0"],
    "blend lora.safetensors -o new.safetensors --rank 0": ["rank", "0"],
    "blend lora.safetensors -o new.safetensors --block unet.*:1": ["unet.*:1", "FILE="],
    "blend lora.safetensors -o new.safetensors --block other=unet.*:1": ["other", "none of the files"],
    "blend lora.safetensors -o new.safetensors --block lora=text_encoder.*:1": ["text_encoder.*"],
    "blend lora.safetensors xl.safetensors -o new.safetensors": ["SD 1.x", "SDXL"],
    "resize lora.safetensors -o new.safetensors": ["--rank", "--ratio"],
    "resize lora.safetensors -o new.safetensors --rank 1.5": ["--rank", "1.5"],
    "resize lora.safetensors -o new.safetensors --ratio 2 --frobenius 0.5": ["ratio", "frobenius"],
    "resize lora.safetensors -o new.safetensors --frobenius 2": ["frobenius", "2"],
    "extract tiny -o new.safetensors": ["--base"],
    "extract tiny --base tiny -o new.safetensors": ["nothing to extract"],
    "extract tiny --base tiny -o lora.safetensors": ["lora.safetensors", "overwrite"],
    "extract tiny --base tiny -o new.safetensors --component unett": ["unett", "unet"],
    "extract tiny --base toybox -o new.safetensors": ["two kinds"],
    "extract hollow --base tiny -o new.safetensors": ["hollow", "model_index.json"],
    "merge lora.safetensors -o new": ["--base"],
    "merge --base tiny -o new": ["no LoRA"],
    "merge lora.safetensors --base tiny -o new": ["lora.safetensors", "SD 1.x"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with things that are not what they should be."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_folder(folder / "tiny")
    tiny_folder(folder / "weightless")
    (folder / "weightless" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("empty", "hollow", "pictures", "texts", "outputs"):
        (folder / name).mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "pictures" / "a.png")
    (folder / "pictures" / "a.txt").write_text("a red square")
    (folder / "texts" / "a.png").write_text("this is no picture")
    (folder / "broken.toml").write_text("rank = = 4")
    (folder / "typo.toml").write_text("ranke = 4")
    (folder / "short.safetensors").write_bytes(b"\x00\x01\x00\x00\x00\x00\x00\x00{")
    (folder / "notes:from:me.safetensors").write_text("this is no LoRA")
    _lora(folder / "lora.safetensors", 768)
    _lora(folder / "xl.safetensors", 2048)
    return folder


def _lora(path: Path, width: int) -> None:
    block = "input_blocks_4_1" if width == 2048 else "input_blocks_1_1"
    name = f"lora_unet_{block}_transformer_blocks_0_attn2_to_k"
    out = 640 if width == 2048 else 320
    save_file({f"{name}.lora_up.weight": torch.ones(out, 1), f"{name}.lora_down.weight": torch.ones(1, width)}, path)


def _content(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("line", WRONG)
def test_one_line_and_exit_code_2(
    line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    before = _content(workplace)
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    told = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(told) == 1 and told[0].startswith("sdlora: "), told
    assert all(word in told[0] for word in WRONG[line]), told
    assert _content(workplace) == before, "a refused command must leave everything as it was"


def test_interrupting_exits_with_130(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt("stopped after step 3 of 9")

    monkeypatch.setattr("sdlora.cli.making.load", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(["train", "pictures"])
    assert exit.value.code == 130
    assert capfd.readouterr().err == "sdlora: stopped after step 3 of 9\n"
