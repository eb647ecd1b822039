"""Advice before LoRAs are mixed, in the words that people read."""

from pathlib import Path

import torch

from sdlora.lowrank.laws import LowRank
from tests.workbench.pairs import MODULES, QUERY, TEXT, low_rank, scaled, told

MIX = "nothing in the way of mixing them, but look at a ladder of weights"


def test_advice_names_the_blocks_that_are_against_each_other(tmp_path: Path) -> None:
    first = {module: low_rank(module, i) for i, module in enumerate(MODULES)}
    second = {module: low_rank(module, 40 + i) for i, module in enumerate(MODULES)}
    second[MODULES[2]], second[MODULES[3]] = (scaled(first[module], -1) for module in MODULES[2:4])
    advice = told(tmp_path, first, second).pairs[0].advice
    assert advice == (
        "A and B change the same directions in M00, OUT00 with opposite sign (cosine -1.00): "
        "lower one there, or use switch or composite"
    )


def test_advice_makes_neighbours_a_range(tmp_path: Path) -> None:
    modules = [f"unet.up_blocks.{i}.attentions.{j}.{QUERY}" for i in (0, 1) for j in (0, 1)]
    first = {module: low_rank(module, i) for i, module in enumerate(modules)}
    second = {module: scaled(delta, 0.8 if i < 3 else 0.01) for i, (module, delta) in enumerate(first.items())}
    second[modules[3]] = low_rank(modules[3], 9)
    advice = told(tmp_path, first, second).pairs[0].advice
    assert "push the same way in OUT00 to OUT03 (cosine 1.00)" in advice


def test_advice_tells_what_is_nearly_one_what_drowns_and_what_hardly_touches(tmp_path: Path) -> None:
    first = {module: low_rank(module, i) for i, module in enumerate(MODULES)}
    other = {module: low_rank(module, 40 + i) for i, module in enumerate(MODULES)}
    assert told(tmp_path, first, other).pairs[0].advice == f"A and B hardly touch: {MIX}"
    large = {module: scaled(delta, 5.0) for module, delta in first.items()}
    advice = told(tmp_path, first, large).pairs[0].advice
    assert "nearly the same change (cosine 1.00)" in advice and "B is 5 times as large as A" in advice
    advice = told(tmp_path, {MODULES[0]: first[MODULES[0]]}, {TEXT: first[TEXT]}).pairs[0].advice
    assert advice == f"A and B change different blocks: {MIX}"
    nothing = {module: scaled(delta, 0.0) for module, delta in first.items()}
    found = told(tmp_path, first, nothing)
    assert found.pairs[0].advice == "nothing to compare: B changes nothing that can be measured"
    assert found.equalised is None and found.why_not == "B changes nothing"


def test_advice_tells_of_directions_that_are_shared_without_a_sign(tmp_path: Path) -> None:
    module = MODULES[0]
    one = low_rank(module, 0, rank=2)
    turned = LowRank(one.down, torch.stack([one.up[:, 1], -one.up[:, 0]], 1), one.alpha)
    found = told(tmp_path, {module: one}, {module: turned}).pairs[0]
    assert abs(found.whole.cosine or 0) < 0.2 and (found.whole.columns or 0) > 0.9 < (found.whole.rows or 0)
    assert "work on the same directions in IN01" in found.advice
