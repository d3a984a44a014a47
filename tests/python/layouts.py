"""What the tensors of exported files mean, in NumPy, by the definitions of their formats."""

import json

import numpy as np

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
H256 = np.kron(np.kron(np.kron(H4, H4), H4), H4)


def undo_comfy(file, layer):
    """The weight that a layer's three tensors mean, in double precision, and whether it is rotated."""
    marker = json.loads(bytes(file[layer + ".comfy_quant"]))
    assert marker["format"] == "int8_tensorwise" and file[layer + ".weight"].dtype == np.int8
    scale = file[layer + ".weight_scale"]
    assert scale.dtype == np.float32 and scale.shape == (file[layer + ".weight"].shape[0], 1)
    w = file[layer + ".weight"].astype(np.float64) * scale
    if marker["convrot"]:
        assert marker["convrot_groupsize"] == 256
        w = (w.reshape(len(w), -1, 256) @ H256).reshape(w.shape)
    return w, marker["convrot"]


def unpack_words(words, bits, axis):
    parts = [words.view(np.uint32) >> np.uint32(k) & np.uint32((1 << bits) - 1) for k in range(0, 32, bits)]
    return np.stack(parts, axis + 1).reshape([n * (32 // bits) if i == axis else n for i, n in enumerate(words.shape)]).astype(np.int64)


def undo_gptq(file, layer, bits):
    """s (q - (qzero + 1)), by the group that g_idx names, as [out, in]."""
    q, zeros = unpack_words(file[layer + ".qweight"], bits, 0), unpack_words(file[layer + ".qzeros"], bits, 1) + 1
    assert zeros.max() < 2**bits  # a reader that adds the one to packed words must not carry
    group = file[layer + ".g_idx"]
    assert q.shape[0] == len(group) and np.array_equal(group, np.sort(group))
    return (file[layer + ".scales"].astype(np.float32)[group] * (q - zeros[group])).T.astype(np.float32)
