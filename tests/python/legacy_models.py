"""Model folders in the older Parquet formats, as their writers made them (docs/format.md, "Older formats").

Run from the repository root, it refreshes the fixtures of the C tests: python tests/python/legacy_models.py
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BASE_FIELDS = [
    ("layer_name", pa.string()),
    ("shape", pa.list_(pa.uint64())),
    ("dtype", pa.string()),
    ("data", pa.large_binary()),
    ("num_params", pa.uint64()),
    ("quant_type", pa.string()),
    ("scales", pa.list_(pa.float32())),
    ("zero_points", pa.list_(pa.float32())),
    ("quant_axis", pa.uint64()),
    ("group_size", pa.uint64()),
]
EXTENDED_FIELDS = [
    ("is_diffusion_model", pa.bool_()),
    ("modality", pa.string()),
    ("time_aware_quant_json", pa.string()),
    ("spatial_quant_json", pa.string()),
    ("activation_stats_json", pa.string()),
]


def write_row(path, row, extended=False, **options):
    schema = pa.schema(BASE_FIELDS + (EXTENDED_FIELDS if extended else []))
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in schema.names}], schema=schema), path, **options)


def coded(name, shape, bits, axis, group, scales, zeros, rng):
    """A row with one byte per code."""
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    return codes, {
        "layer_name": name,
        "shape": list(shape),
        "dtype": "float32",
        "data": codes.tobytes(),
        "num_params": int(codes.size),
        "quant_type": f"int{bits}",
        "scales": [float(s) for s in scales],
        "zero_points": [float(z) for z in zeros],
        "quant_axis": axis,
        "group_size": group,
    }


def write_base_model(folder):
    """A folder with every grouping; returns {name: float32 values} of what it means."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    values = {}

    def pairs(n):
        return rng.random(n, dtype=np.float32) + np.float32(0.5), (rng.random(n, dtype=np.float32) * 4).round(2)

    def put(name, row, extended=False, **options):
        write_row(folder / (name.replace(".", "_") + ".parquet"), row, extended, **options)

    s, z = pairs(4 * 3)
    codes, row = coded("grouped.int4", (4, 40), 4, 1, 16, s, z, rng)
    values["grouped.int4"] = (codes - z.reshape(4, 3)[:, np.arange(40) // 16]) * s.reshape(4, 3)[:, np.arange(40) // 16]
    put("grouped.int4", row)

    s, z = pairs(6)
    codes, row = coded("rows.int8", (6, 5, 2), 8, 0, None, s, z, rng)
    values["rows.int8"] = (codes - z[:, None, None]) * s[:, None, None]
    put("rows.int8", row, compression="zstd")

    s, z = pairs(1)
    codes, row = coded("tensor.int2", (3, 7), 2, None, None, s, z, rng)
    values["tensor.int2"] = (codes - z[0]) * s[0]
    put("tensor.int2", row, compression="none", use_dictionary=False)

    s, z = pairs(9)
    codes, row = coded("inputs.int8", (4, 9), 8, 1, None, s, z, rng)
    values["inputs.int8"] = (codes - z) * s
    put("inputs.int8", row)

    s, z = pairs(2)
    codes, row = coded("channels.int8", (8, 6), 8, 0, 4, s, z, rng)
    equalization = [1.0, 2.0, 1.0, 0.5, 1.0, 1.5]
    coded_values = ((codes - np.repeat(z, 4)[:, None]) * np.repeat(s, 4)[:, None]).astype(np.float32)
    values["channels.int8"] = coded_values * np.float32(equalization)  # the codes are those of the weights divided by the scales
    row |= {
        "is_diffusion_model": True,
        "modality": "image",
        "time_aware_quant_json": json.dumps(
            {
                "enabled": True,
                "num_time_groups": 2,
                "time_group_params": [{"time_range": [a, b], "scale": 0.5, "zero_point": 1.0, "group_size": 64} for a, b in ((0, 500), (500, 1000))],
            }
        ),
        "spatial_quant_json": json.dumps({"enabled": True, "channel_equalization": True, "activation_smoothing": False, "equalization_scales": equalization}),
        "activation_stats_json": json.dumps({"mean": [0.25, 0.5], "std": [1.0, 2.0], "min": [-3.0, -4.5], "max": [2.5, 5.0]}),
    }
    put("channels.int8", row, extended=True)

    kept = rng.standard_normal((2, 3)).astype(np.float32)
    values["kept"] = kept
    put(
        "kept",
        {
            "layer_name": "kept",
            "shape": [2, 3],
            "dtype": "float32",
            "data": kept.tobytes(),
            "num_params": 6,
            "quant_type": "none",
            "scales": [],
            "zero_points": [],
        },
    )

    binary = rng.standard_normal(5).astype(np.float32)
    values["binary"] = binary
    put(
        "binary",
        {"layer_name": "binary", "shape": [5], "dtype": "float32", "data": b"", "num_params": 5, "quant_type": "float32", "scales": [], "zero_points": []},
    )
    (folder / "binary.bin").write_bytes(binary.tobytes())

    (folder / "metadata.json").write_text(json.dumps({"modality": "image"}) + "\n")
    return {name: v.astype(np.float32) for name, v in values.items()}


def write_v1_model(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(8)
    values = {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(2).astype(np.float32)}
    for name, v in values.items():
        table = pa.table({"name": [name], "shape": pa.array([list(v.shape)], pa.list_(pa.uint64())), "data": pa.array([v.tobytes()], pa.binary())})
        pq.write_table(table, folder / (name.replace(".", "_") + ".parquet"))
    return values


if __name__ == "__main__":
    fixtures = Path("tests/fixtures")
    for name, write in (("base_v2", write_base_model), ("v1", write_v1_model)):
        for tensor, v in write(fixtures / name).items():
            (fixtures / name / f"{tensor.replace('.', '_')}.expected").write_bytes(v.tobytes())
