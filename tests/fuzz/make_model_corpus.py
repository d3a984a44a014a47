"""Writes the seed corpora of fuzz_safetensors, fuzz_index, fuzz_lora and fuzz_plan: small good and bad files, one for each way that a format can be wrong.

Run from the repository root: python3 tests/fuzz/make_model_corpus.py
"""

import json
import struct
from pathlib import Path

ROOT = Path(__file__).parent / "corpus"


def entry(dtype: str, shape: list, begin: int, end: int, **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def safetensors(header, n_data: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(i % 61 for i in range(n_data))


A = entry("F32", [2], 0, 8)
AT = json.dumps(A)
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


def every_dtype() -> bytes:
    at, header = 0, {}
    for name, size in DTYPES.items():
        header[f"t.{name}.weight"] = entry(name, [3, 2], at, at + 6 * size)
        at += 6 * size
    return safetensors(header, at)


SAFETENSORS = {
    "good_one": safetensors({"a": A}, 8),
    "good_two_in_other_order": safetensors({"b": entry("BF16", [2, 2], 8, 16), "a": A}, 16),
    "good_metadata": safetensors({"__metadata__": {"format": "pt", "modality": "image"}, "a": A}, 8),
    "good_padding": safetensors(json.dumps({"a": A}) + "    ", 8),
    "good_every_dtype": every_dtype(),
    "good_scalar_and_empty": safetensors({"s": entry("F32", [], 0, 4), "e": entry("F32", [0, 7], 4, 4)}, 4),
    "good_five_dims": safetensors({"v.weight": entry("U8", [2, 1, 3, 1, 2], 0, 12)}, 12),
    "good_escapes": safetensors('{"\\u00e9\\ud83d\\ude00\\n\\"":' + AT + "}", 8),
    "good_extra_field": safetensors({"a": entry("F32", [2], 0, 8, note={"x": [1, -2.5e3, None, True, {}]})}, 8),
    "good_fp8_scale": safetensors({"w.weight": entry("F8_E4M3", [2, 2], 0, 4), "w.scale_weight": entry("F32", [], 4, 8)}, 8),
    "good_fp8_row_scale": safetensors({"w.weight": entry("F8_E5M2", [2, 2], 0, 4), "w.weight_scale": entry("BF16", [2, 1], 4, 8)}, 8),
    "good_unknown_dtype_": safetensors({"a": entry("F4", [4], 0, 2), "b": entry("Q", [1], 2, 6)}, 6),
    "bad_short": b"\x01\0\0\0",
    "bad_length_zero": safetensors("", 4),
    "bad_length_large": safetensors({"a": A}, 8, length=1000),
    "bad_length_huge": safetensors({"a": A}, 8, length=1 << 63),
    "bad_space_first": safetensors(" {}", 0),
    "bad_tail": safetensors(json.dumps({"a": A}) + "\n", 8),
    "bad_utf8": safetensors(b'{"\xff":' + AT.encode() + b"}", 8),
    "bad_surrogate": safetensors('{"\\ud800":' + AT + "}", 8),
    "bad_nul": safetensors('{"a\\u0000":' + AT + "}", 8),
    "bad_duplicate_name": safetensors(f'{{"a":{AT},"a":{AT}}}', 8),
    "bad_duplicate_field": safetensors('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "bad_overlap": safetensors({"a": A, "b": entry("F32", [2], 4, 12)}, 12),
    "bad_gap": safetensors({"a": A, "b": entry("F32", [2], 12, 20)}, 20),
    "bad_rest": safetensors({"a": A}, 9),
    "bad_begin_after_end": safetensors({"a": entry("F32", [2], 8, 0)}, 8),
    "bad_size": safetensors({"a": entry("F32", [3], 0, 8)}, 8),
    "bad_overflow": safetensors({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}, 0),
    "bad_zero_overflow": safetensors({"a": entry("F32", [0, 1 << 63, 4], 0, 0)}, 0),
    "bad_negative": safetensors({"a": entry("F32", [-2], 0, 8)}, 8),
    "bad_fraction": safetensors({"a": entry("F32", [2.0], 0, 8)}, 8),
    "bad_three_offsets": safetensors('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', 8),
    "bad_missing": safetensors('{"a":{"dtype":"F32","shape":[2]}}', 8),
    "bad_metadata": safetensors({"__metadata__": {"a": 1}, "a": A}, 8),
    "bad_empty": safetensors("{}", 0),
    "bad_depth": safetensors('{"a":{"x":' + "[" * 100, 0),
    "bad_comma": safetensors('{"a":' + AT + ",}", 8),
    "bad_scale_alone": safetensors({"w.scale_weight": entry("F32", [], 0, 4)}, 4),
    "bad_qweight": safetensors({"w.qweight": entry("I32", [1], 0, 4)}, 4),
}

MAP = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
INDEX = {
    "good": {"metadata": {"total_size": 12}, "weight_map": MAP},
    "good_wrong_total": {"weight_map": MAP, "metadata": {"total_size": 13.5, "more": [1, {"x": None}]}, "other": True},
    "good_metadata_null": {"weight_map": MAP, "metadata": None},
    "bad_path": {"weight_map": {"x": "../a.safetensors"}},
    "bad_device": {"weight_map": {"x": "nul.safetensors"}},
    "bad_pickle": {"weight_map": {"x": "a.bin"}},
    "bad_missing": {"weight_map": {"x": "c.safetensors"}},
    "bad_unlisted": {"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}},
    "bad_absent": {"weight_map": MAP | {"w": "b.safetensors"}},
    "bad_elsewhere": {"weight_map": MAP | {"x": "b.safetensors"}},
    "bad_value": {"weight_map": {"x": 1}},
    "bad_empty": {"weight_map": {}},
    "bad_no_map": {"metadata": {}},
    "bad_list": [],
    "bad_duplicate": '{"weight_map":{"x":"a.safetensors","x":"a.safetensors"}}',
    "bad_twice": '{"weight_map":{"x":"a.safetensors"},"weight_map":{}}',
    "bad_nan": '{"metadata":{"total_size":NaN},"weight_map":{"x":"a.safetensors"}}',
    "bad_tail": '{"weight_map":{"x":"a.safetensors"}} x',
}


def adapter(tensors: dict, strength: str = "", metadata: dict | None = None) -> bytes:
    """{name: shape} as F32, behind the text of a strength."""
    at, header = 0, {"__metadata__": metadata} if metadata else {}
    for name, shape in tensors.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = entry("F32", shape, at, at + size)
        at += size
    return bytes([len(strength)]) + strength.encode() + safetensors(header, at)


KOHYA = {"lora_unet_b_0_q.lora_down.weight": [2, 4], "lora_unet_b_0_q.lora_up.weight": [6, 2], "lora_unet_b_0_q.alpha": []}
PEFT = {"transformer.b.0.q.lora_A.weight": [1, 4], "transformer.b.0.q.lora_B.weight": [6, 1]}
CONV = {"b.0.conv.lora_A.weight": [2, 2, 2, 2], "b.0.conv.lora_B.weight": [3, 2, 1, 1]}
ALPHA = json.dumps({"lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"q": 2.5}})
LORA = {
    "good_kohya": adapter(KOHYA),
    "good_strength": adapter(KOHYA, "-0.75"),
    "good_peft": adapter(PEFT, "2", {"lora_adapter_metadata": ALPHA}),
    "good_both_layers": adapter(PEFT | CONV),
    "good_text_encoder": adapter(KOHYA | {"lora_te_x.alpha": []}),
    "bad_strength": adapter(KOHYA, "1e9"),
    "bad_half": adapter({k: v for k, v in KOHYA.items() if "up" not in k}),
    "bad_rank": adapter(PEFT | {"transformer.b.0.q.lora_B.weight": [6, 2]}),
    "bad_layer": adapter(PEFT | {"b.1.q.lora_A.weight": [1, 4]}),
    "bad_twice": adapter(PEFT | KOHYA),
    "bad_kind": adapter(KOHYA | {"lora_unet_b_0_q.hada_w1_a": [2, 2]}),
    "bad_alpha": adapter(KOHYA | {"lora_unet_b_0_q.alpha": [2]}),
    "bad_config": adapter(PEFT, "", {"lora_adapter_metadata": '{"lora_alpha":'}),
}

LAYER = {"bits": 4, "group_size": 64, "params": "f16", "method": "search", "sensitivity": 0.5, "error": 1e-3}
PLAN = {
    "good": {"schema": "arrowquant.plan/1", "layers": {"a.weight": LAYER, "b": {"bits": 16}}},
    "good_small": {"layers": {"a": {"group_size": 32}}},
    "bad_bits": {"schema": "arrowquant.plan/1", "layers": {"a": LAYER | {"bits": 3}}},
    "bad_group": {"schema": "arrowquant.plan/1", "layers": {"a": LAYER | {"group_size": -7}}},
    "bad_method": {"schema": "arrowquant.plan/1", "layers": {"a": LAYER | {"method": "none"}}},
    "bad_schema": {"schema": "arrowquant.plan/2", "layers": {}},
    "bad_list": [],
    "bad_cut": '{"schema":"arrowquant.plan/1","layers":{"a":{"bits":4',
}


def main() -> None:
    for folder in ("lora", "plan"):
        (ROOT / folder).mkdir(exist_ok=True)
    for name, data in LORA.items():
        (ROOT / "lora" / name).write_bytes(data)
    for name, value in PLAN.items():
        (ROOT / "plan" / name).write_text(value if isinstance(value, str) else json.dumps(value))
    for name, data in SAFETENSORS.items():
        (ROOT / "safetensors" / name).write_bytes(data)
    for name, value in INDEX.items():
        (ROOT / "index" / name).write_text(value if isinstance(value, str) else json.dumps(value))


if __name__ == "__main__":
    main()
