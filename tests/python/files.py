"""Model files for the tests: written by hand, so that the tests need no other package."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "dit-fashion"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def write_safetensors(path, tensors, metadata=None):
    """tensors: {name: array, or (dtype word, shape, bytes)}. Lists count as float32."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, value in tensors.items():
        if not isinstance(value, tuple):
            array = np.asarray(value, None if isinstance(value, np.ndarray) else np.float32)
            value = DTYPES[array.dtype.name], list(array.shape), array.tobytes()
        dtype, shape, content = value
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return Path(path)


def write_sharded(folder, shards, metadata=True):
    """shards: {file name: {name: array}}; returns the path of the index."""
    weight_map, total = {}, 0
    for file, tensors in shards.items():
        path = write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += path.stat().st_size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0]
    index = {"weight_map": weight_map} | ({"metadata": {"total_size": total}} if metadata else {})
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def write_model(folder, tensors=None, modality="image", n_layers=3, rows=64, cols=256, seed=0):
    """A plain model folder: metadata.json (unless modality is None) and one weights file with Gaussian layers."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        rng = np.random.default_rng(seed)
        tensors = {f"blocks.{i}.linear.weight": rng.standard_normal((rows, cols)).astype(np.float32) for i in range(n_layers)}
    if modality is not None:
        (folder / "metadata.json").write_text(json.dumps({"modality": modality}))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def tree_bytes(folder):
    """{relative path: bytes} of every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def write_short_dit(folder, n_blocks=1):
    """The sample DiT with its first blocks only: a pipeline folder that loads and runs like the whole one, in a fraction of the time."""
    shutil.copytree(SAMPLE, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file = path.read_bytes()
    begin = 8 + struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8:begin])
    header.pop("__metadata__", None)
    kept = {name: t for name, t in header.items() if not name.startswith("transformer_blocks.") or int(name.split(".")[1]) < n_blocks}
    write_safetensors(path, {name: (t["dtype"], t["shape"], file[begin + t["data_offsets"][0] : begin + t["data_offsets"][1]]) for name, t in kept.items()})
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": n_blocks}))
    return folder
