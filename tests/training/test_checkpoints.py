"""Checkpoints: everything comes back as it was, and what is not complete is not there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.errors import SdloraError
from sdlora.training import checkpoints
from sdlora.training.checkpoints import State

SHARED = torch.arange(6.0)
PLAIN = {
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": SHARED[:3]}, 1: {"exp_avg": SHARED[3:], "bits": None}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "fused": False}],
    },
    "scaler": None,
}


def write_lora(path: Path) -> None:
    path.write_bytes(b"lora")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    parameters = {"unet.a.down": torch.randn(2, 3), "unet.a.up": torch.randn(3, 2).t()}
    path = checkpoints.save(tmp_path, State(12, parameters, PLAIN, {"global_batch": 4}), write_lora)
    assert path == tmp_path / "checkpoints" / "000012" == checkpoints.latest(tmp_path)
    assert {file.name for file in path.iterdir()} == {"training.state", f"{tmp_path.name}-000012.safetensors"}
    state = checkpoints.load(path)
    assert state.step == 12 and state.facts == {"global_batch": 4}
    assert all(torch.equal(state.parameters[name], tensor) for name, tensor in parameters.items())
    optimizer = state.plain["optimizer"]
    assert optimizer["param_groups"] == PLAIN["optimizer"]["param_groups"] and state.plain["scaler"] is None
    assert optimizer["state"].keys() == {0, 1} and optimizer["state"][1]["bits"] is None
    assert torch.equal(optimizer["state"][1]["exp_avg"], SHARED[3:])


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, State(5, {}, PLAIN, {}), fail)
    assert checkpoints.latest(tmp_path) is None
    checkpoints.save(tmp_path, State(5, {}, PLAIN, {}), write_lora)
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "000005"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_latest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step in (9, 1_000_000, 200):
        checkpoints.save(tmp_path, State(step, {}, PLAIN, {}), write_lora)
    latest = checkpoints.latest(tmp_path)
    assert latest is not None and checkpoints.load(latest).step == 1_000_000
    assert checkpoints.latest(tmp_path, before=200) == tmp_path / "checkpoints" / "000009"
    assert checkpoints.latest(tmp_path, before=9) is None


def test_damage_is_one_line_with_a_way_out(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, State(5, {"a": torch.ones(9)}, PLAIN, {}), write_lora)
    file = path / checkpoints.STATE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SdloraError, match=r"training\.state is damaged .*delete .*000005"):
        checkpoints.load(path)


def test_states_that_cannot_be_written_safely_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SdloraError, match="keeps a set"):
        checkpoints.save(tmp_path, State(5, {}, {"optimizer": {1, 2}}, {}), write_lora)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, State(5, {"a": torch.ones(9)}, PLAIN, {}), write_lora)
    assert torch.equal(load_file(path / checkpoints.STATE)["parameter.a"], torch.ones(9))
