"""Writes the seed corpora of fuzz_gguf and fuzz_importance: small good files of every type, and files that are wrong in one field each.

A file is built from its fields, and every field of a good file is set to values that have broken readers (0, 1, all ones, powers of two beside the limits), so
that the fuzzer starts behind the magic number and the counts. Run from the repository root: python3 tests/fuzz/make_gguf_corpus.py
"""

import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
ROOT = CORPUS / "gguf"
TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144)}
TYPES |= {13: (256, 176), 14: (256, 210), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Writer:
    """Bytes, and where each number of the header stands: (offset, format)."""

    def __init__(self):
        self.data, self.fields = bytearray(b"GGUF"), []

    def number(self, fmt, value):
        self.fields.append((len(self.data), fmt))
        self.data += struct.pack("<" + fmt, value)

    def text(self, value):
        self.number("Q", len(value))
        self.data += value.encode()

    def value(self, kind, value):
        self.number("I", kind)
        if kind == 8:
            self.text(value)
        elif kind == 9:
            inner, items = value
            self.number("I", inner)
            self.number("Q", len(items))
            for item in items:
                self.text(item) if inner == 8 else self.number(SCALARS[inner], item)
        else:
            self.number(SCALARS[kind], value)


def build(pairs, tensors, alignment=32, version=3):
    w = Writer()
    for fmt, value in (("I", version), ("Q", len(tensors)), ("Q", len(pairs))):
        w.number(fmt, value)
    for key, kind, value in pairs:
        w.text(key)
        w.value(kind, value)
    at, data = 0, bytearray()
    for name, dims, kind in tensors:
        values, size = TYPES[kind]
        count = 1
        for d in dims:
            count *= d
        w.text(name)
        w.number("I", len(dims))
        for d in dims:
            w.number("Q", d)
        w.number("I", kind)
        w.number("Q", at)
        data += bytes(i % 61 for i in range(count // values * size))
        data += bytes(-len(data) % alignment)
        at = len(data)
    w.data += bytes(-len(w.data) % alignment) + data
    return w


PAIRS = [("general.architecture", 8, "flux"), ("general.alignment", 4, 32), ("tokens", 9, (8, ["a", "bc", ""])), ("scores", 9, (6, [0.5, 1.0]))]
PAIRS += [(f"k{kind}", kind, 1) for kind in SCALARS] + [("comfy.gguf.orig_shape.v.weight", 9, (5, [2, 3, 1, 2, 2]))]
TENSORS = [("blocks.0.ff.weight", [256, 2], 12), ("blocks.0.norm.weight", [4], 0), ("v.weight", [2, 2, 1, 6], 1), ("empty", [0, 3], 0)]


def main():
    ROOT.mkdir(parents=True, exist_ok=True)
    small = build([("general.alignment", 4, 32)], [("a.weight", [32, 2], 8), ("b", [3], 0)])
    files = {"good_all": build(PAIRS, TENSORS), "good_small": small, "good_v2": build([], TENSORS, version=2)}
    files["good_align_8"] = build([("general.alignment", 4, 8)], [("a", [3], 24), ("b", [3], 24)], alignment=8)
    for kind, (values, _) in TYPES.items():
        files[f"good_type_{kind}"] = build([], [("a.weight", [values, 2], kind)])
    out = {name: bytes(w.data) for name, w in files.items()}
    for i, (at, fmt) in enumerate(small.fields):
        size = struct.calcsize(fmt)
        for word, value in (("zero", 0), ("one", 1), ("ones", 2 ** (8 * size) - 1), ("top", 2 ** (8 * size - 1)), ("big", 2 ** (8 * size - 2) + 1)):
            bad = bytearray(small.data)
            bad[at : at + size] = value.to_bytes(size, "little")
            if bytes(bad) != bytes(small.data):
                out[f"field_{i:02}_{word}"] = bytes(bad)
    for cut in (4, 8, 20, 40, len(small.data) - 1):
        out[f"cut_{cut}"] = bytes(small.data[:cut])
    for name, data in out.items():
        (ROOT / name).write_bytes(data)

    importance()


def importance():
    """Both forms: GGUF with summed squares and counts, and the older list of entries."""
    folder = CORPUS / "importance"
    folder.mkdir(exist_ok=True)
    sums = [("a.weight.in_sum2", [8, 1], 0), ("a.weight.counts", [1, 1], 0), ("e.weight.in_sum2", [4, 2], 0), ("e.weight.counts", [1, 2], 0)]
    good = bytearray(build([("general.type", 8, "imatrix")], sums).data)
    good[-32 * 4 :] = struct.pack("<32f", *(i / 8 for i in range(32)))
    entry = struct.pack("<i", 1) + b"a" + struct.pack("<ii4f", 3, 4, 0.5, 1, 2, 0)
    files = {"good_gguf": good, "good_list": struct.pack("<i", 1) + entry, "good_two": struct.pack("<i", 2) + entry + entry.replace(b"a", b"b", 1)}
    files |= {"bad_twice": struct.pack("<i", 2) + 2 * entry, "bad_cut": struct.pack("<i", 2) + entry, "bad_alone": build([], sums[:1]).data}
    for name, data in files.items():
        (folder / name).write_bytes(bytes(data))


if __name__ == "__main__":
    main()
