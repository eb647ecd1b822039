"""Small valid files of every kind, with modules of SD 1.x, as drafts that can be damaged before they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 320x320
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # 320x768
CONV = "lora_unet_conv_out"  # 4x320x3x3
NORM = "lora_unet_down_blocks_0_attentions_0_norm"  # 320
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {"lora_down.weight": (1, 320), "lora_up.weight": (320, 1)}
# By kind: what each module holds, by the ends of keys; () is the shape of a number.
MODULES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "lora": {
        QUERY: PAIR | {"alpha": ()},
        CROSS: {"lora_down.weight": (1, 768), "lora_up.weight": (320, 1)},
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": {
            "lora_down.weight": (1, 768),
            "lora_up.weight": (768, 1),
            "alpha": (),
        },
    },
    "locon": {
        CONV: {"lora_down.weight": (2, 320, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (4, 2, 1, 1)},
        QUERY: PAIR | {"lora_B.bias": (320,)},
        "lora_unet_conv_in": {"lora_down.weight": (1, 4, 3, 3), "lora_up.weight": (320, 1, 1, 1)},
    },
    "loha": {
        QUERY: {"hada_w1_a": (320, 1), "hada_w1_b": (1, 320), "hada_w2_a": (320, 1), "hada_w2_b": (1, 320)},
        CONV: {"hada_t1": (1, 1, 3, 3), "hada_w1_a": (1, 4), "hada_w1_b": (1, 320)}
        | {"hada_t2": (1, 1, 3, 3), "hada_w2_a": (1, 4), "hada_w2_b": (1, 320), "alpha": ()},
    },
    "lokr": {
        QUERY: {"lokr_w1": (16, 16), "lokr_w2_a": (20, 1), "lokr_w2_b": (1, 20), "alpha": ()},
        CROSS: {"lokr_w1_a": (16, 1), "lokr_w1_b": (1, 16), "lokr_w2": (20, 48)},
        CONV: {"lokr_w1": (2, 16), "lokr_t2": (1, 1, 3, 3), "lokr_w2_a": (1, 2), "lokr_w2_b": (1, 20)},
    },
    "dora": {
        QUERY: PAIR | {"dora_scale": (1, 320), "alpha": ()},
        CROSS: {"lora_A.weight": (1, 768), "lora_B.weight": (320, 1), "lora_magnitude_vector": (320,)},
        CONV: {"lora_down.weight": (1, 320, 3, 3), "lora_up.weight": (4, 1, 1, 1), "dora_scale": (4, 1, 1, 1)},
    },
    "oft": {
        QUERY: {"oft_blocks": (40, 8, 8), "rescale": (320, 1), "alpha": ()},
        CROSS: {"oft_blocks": (2, 40, 8, 8)},
        QUERY.replace("to_q", "to_k"): {"oft_diag": (40, 8, 8)},
        QUERY.replace("to_q", "to_v"): {"oft_R.weight": (40, 28), "oft_R.scaled_oft": ()},
        CROSS.replace("to_k", "to_q"): {"boft_R": (2, 40, 8, 8), "boft_s": (320, 1)},
    },
    "ia3": {
        QUERY: {"weight": (320,), "on_input": ()},
        f"base_model.model.{DOTTED[:-4]}to_k": {"ia3_l": (320, 1)},
    },
    "glora": {
        QUERY: {"a1.weight": (320, 1), "a2.weight": (1, 320), "b1.weight": (320, 1), "b2.weight": (1, 320)},
        CROSS: {"a1.weight": (1, 768), "a2.weight": (768, 1), "b1.weight": (1, 768), "b2.weight": (320, 1)},
    },
    "full": {
        CONV: {"diff": (4, 320, 3, 3), "diff_b": (4,)},
        NORM: {"w_norm": (320,), "b_norm": (320,)},
        NORM.replace("_norm", "_proj_in"): PAIR | {"scale": ()},
        QUERY: PAIR,
        "lora_te_text_model_final_layer_norm": {"set_weight": (768,)},
    },
    "diffusers": {
        f"unet.{DOTTED}": {"lora.down.weight": (1, 320), "lora.up.weight": (320, 1)},
        f"unet.{DOTTED[:-4]}to_k": {"lora_A.weight": (1, 320), "lora_B.weight": (320, 1)},
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": {
            "lora_linear_layer.down.weight": (1, 768),
            "lora_linear_layer.up.weight": (768, 1),
        },
    },
    "peft folder": {
        f"base_model.model.{DOTTED}": {"lora_A.weight": (1, 320), "lora_B.weight": (320, 1)},
        f"base_model.model.{DOTTED[:-4]}to_k": {"lora_A.weight": (1, 320), "lora_B.weight": (320, 1)},
    },
    "tokens": {
        QUERY: PAIR,
        "bundle_emb.zib": {"string_to_param.*": (2, 768)},
        "bundle_emb.zub": {"clip_l": (1, 768)},
    },
    "ordered": {
        f"text_encoder:{number}": {":up": (768, 1), ":down": (1, 768)} for number in range(48)
    } | {"<s1>": {"": (768,)}},
}  # fmt: skip
SETTINGS = {
    "r": 1,
    "lora_alpha": 2,
    "rank_pattern": {r"attn1\.to_q": 1},
    "alpha_pattern": {"to_k": 4},
    "use_dora": False,
}
METADATA = {
    "lora": {
        "ss_tag_frequency": '{"10_zib": {"zib": 20, "cat": 9}}',
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
    },
    "diffusers": {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in SETTINGS.items()})},
    "peft folder": {"format": "pt"},
    "ordered": {"text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"},
}


@dataclass
class Draft:
    """A file that is about to be written: [dtype, shape, bytes] by key, metadata, and what lies beside it."""

    tensors: list[tuple[str, str, list[int], bytes]]
    metadata: dict[str, Any]
    config: str | None = None
    raw: list[Callable[[bytearray], None]] = field(default_factory=list)  # what is done to the bytes at last

    def written(self) -> bytes:
        """As a list of pairs and not a dict, so that a key may be told twice."""
        entries, body = [f'"__metadata__":{json.dumps(self.metadata)}'], b""
        for key, dtype, shape, content in self.tensors:
            span = [len(body), len(body) + len(content)]
            entries.append(f"{json.dumps(key)}:{json.dumps({'dtype': dtype, 'shape': shape, 'data_offsets': span})}")
            body += content
        head = ("{" + ",".join(entries) + "}").encode()
        file = bytearray(len(head).to_bytes(8, "little") + head + body)
        for change in self.raw:
            change(file)
        return bytes(file)


@cache
def tensors_of(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float8_e4m3fn if kind == "ordered" else torch.float16
    found = {}
    for stem, parts in MODULES[kind].items():
        for end, shape in parts.items():
            dot = "." if end and kind != "ordered" else ""
            found[f"{stem}{dot}{end}"] = torch.randn(shape, generator=generator).mul(0.1).to(dtype)
    return found


def draft_of(kind: str) -> Draft:
    content = save(tensors_of(kind))
    head = json.loads(content[8 : (start := 8 + int.from_bytes(content[:8], "little"))])
    tensors = []
    for key, told in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (start + offset for offset in told["data_offsets"])
        tensors.append((key, told["dtype"], told["shape"], content[begin:end]))
    config = json.dumps({"peft_type": "LORA", **SETTINGS}) if kind == "peft folder" else None
    return Draft(tensors, dict(METADATA.get(kind, {})), config)
