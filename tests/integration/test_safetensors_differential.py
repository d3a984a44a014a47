"""Our reader against the reference reader (the safetensors package) on mutated files: we may refuse more, never accept more, and see the same tensors."""

import json
import random
import struct

import pytest

safetensors = pytest.importorskip("safetensors")

# What we refuse and the reference reader takes, by rows of the design.
STRICTER = (
    "begins with '{'",  # ST02
    "only spaces may stand",  # ST03: a newline
    "NUL",  # ST04
    "more than once",  # ST05
    "appears twice",  # ST05
    "unknown dtype",  # ST09
    "no tensors",  # ST13
    "over the limit",  # ST16
    "limit of 8",  # rank
    "overflows 64 bits",  # a zero beside dimensions whose product overflows
    "already quantized",  # IX09
)


def header_of(draw):
    """A well-formed header and its data size."""
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    header, at = {}, 0
    if draw.random() < 0.3:
        header["__metadata__"] = {"format": "pt", "é": "ü"}
    for i in range(draw.randint(1, 4)):
        dtype = draw.choice(list(sizes))
        shape = [draw.randint(0, 4) for _ in range(draw.randint(0, 5))]
        size = sizes[dtype]
        for n in shape:
            size *= n
        header[f"blocks.{i}.{draw.choice(['weight', 'bias', 'a b', 'ä'])}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    items = list(header.items())
    draw.shuffle(items)
    return dict(items), at


def mutate(draw, header, n_data):
    """The bytes of a file, mostly wrong in one place."""
    text = json.dumps(header, ensure_ascii=draw.random() < 0.5)
    kind = draw.randrange(10)
    if kind == 1:  # another number
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        at = draw.choice(digits)
        text = text[:at] + draw.choice(["0", "1", "7", "-1", "1.0", "1e2", "18446744073709551616", '"1"', "null"]) + text[at + 1 :]
    elif kind == 2:  # a byte of the text lost, doubled or changed
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["", text[at] * 2, "x", '"', ",", "}", "[", "\\", "\t", "\\u0000", "\\ud800"]) + text[at + 1 :]
    elif kind == 3:
        n_data += draw.choice([-1, 1, 8])
    elif kind == 4:
        text = draw.choice([" ", "\n", "\ufeff"]) + text
    elif kind == 5:
        text += draw.choice([" ", "  \n", "x", "\0", "        "])
    elif kind == 6:
        text = text.replace("F32", draw.choice(["F31", "f32", "F4", "C64", ""])).replace("weight", draw.choice(["bias", "w\\n"]))
    elif kind == 7:
        text = draw.choice(["{}", "[]", "null", '{"a":1}', '{"__metadata__":{"a":1}}', '{"__metadata__":{}}'])
    elif kind == 8:  # an entry again
        name = draw.choice([k for k in header if k != "__metadata__"])
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    data = text.encode()
    length = len(data) + (draw.choice([-1, 1, 100]) if kind == 9 else 0)
    return struct.pack("<Q", length) + data + bytes(max(n_data, 0))


def reference(data):
    """{name: (dtype, shape)}, or None when the file is refused."""
    try:
        return {name: (t["dtype"], list(t["shape"])) for name, t in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def test_we_accept_no_more_than_the_reference_reader_and_see_the_same(cli, tmp_path):
    draw = random.Random(20240611)
    both = refused = 0
    for i in range(240):
        data = mutate(draw, *header_of(draw))
        path = tmp_path / f"m{i}.safetensors"
        path.write_bytes(data)
        expected, result = reference(data), cli("inspect", "--json", path)
        assert result.code in (0, 3), (data, result.err)
        if result.code == 3:
            message = result.json["error"]["message"]
            refused += 1
            assert expected is None or any(reason in message for reason in STRICTER), (data, message)
        else:
            both += 1
            assert expected is not None, data
            assert {t["name"]: (t["dtype"], t["shape"]) for t in result.json["tensors"]} == expected
    assert both > 50 and refused > 50  # the draw covers both answers
