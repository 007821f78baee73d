"""A small valid layout of every format, as metadata and arrays, for the tests that damage it."""

import numpy as np

# 2 rows of 5 columns; five entries stored in bitmasks, 2 of 4 and 1 of 1 in N:M
MASK = np.array([[0b00010101], [0b00001010]], dtype=np.uint8)
NM_MASK = np.array([[0b00010101], [0b00011010]], dtype=np.uint8)
CODEBOOKS = ("ternary-v1", "binary-v1", "lut4-v1", "lut8-v1")
SCALES = np.array([[0x3F80], [0x4000]], dtype=np.uint16)
ZERO_POINTS = np.array([[0], [15]], dtype=np.uint8)
VALUES = np.array([0x3F80, 0xBF80, 0, 0x4000, 0x3F00], dtype=np.uint16)
GRID = {"group_size": 32, "symmetric": True}
ASYMMETRIC = {"group_size": None, "symmetric": False}


def example(format):
    if format in CODEBOOKS:
        return codebook_example(format)
    if format == "sum-v1":
        (first_meta, first), (second_meta, second) = example("lowrank-bf16-v1"), example("bitmask-int8-v1")
        parts = [{"format": "lowrank-bf16-v1", **first_meta}, {"format": "bitmask-int8-v1", **second_meta}]
        for part in parts:
            del part["shape"]
        arrays = {f"0_{name}": array for name, array in first.items()}
        return {"shape": [2, 5], "parts": parts}, arrays | {f"1_{name}": array for name, array in second.items()}
    packing, values, _ = format.split("-")
    if packing == "tapwise":
        shapes = {"left": (2, 2), "core": (2, 5), "right": (1, 1)}
        meta = {"shape": [2, 5], "num_runs": 5, "inner_rank": 1, "outer_rank": 2}
        return meta, {f"{name}_values": np.resize(VALUES, shape) for name, shape in shapes.items()}
    if packing == "lowrank":
        meta, arrays = {"shape": [2, 5], "rank": 3}, {}
        for side, shape in (("left", (2, 3)), ("right", (3, 5))):
            if values == "bf16":
                arrays[f"{side}_values"] = np.resize(VALUES, shape)
            else:
                arrays[f"{side}_codes"] = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
                arrays[f"{side}_scales"] = np.full((shape[0], 1), 0x3F80, dtype=np.uint16)
                arrays[f"{side}_zero_points"] = np.full((shape[0], 1), 7, dtype=np.uint8)
        return meta | (ASYMMETRIC if values == "int8" else {}), arrays
    meta = {"shape": [2, 5]}
    arrays = {}
    if packing == "bitmask":
        meta["num_values"] = 5
        arrays["mask"] = MASK
    elif packing == "nm":
        meta |= {"keep": 2, "group": 4}
        arrays["mask"] = NM_MASK
    elif packing == "block":  # blocks of 2, 2 and 1 columns, of which the first and the last are stored
        meta |= {"block_shape": [4, 2], "num_values": 6}
        arrays["mask"] = np.array([[0b101]], dtype=np.uint8)
    count = {"dense": 10, "bitmask": 5, "nm": 6, "block": 6}[packing]
    if values == "f32":
        arrays["values"] = np.arange(10, dtype=np.float32).reshape(2, 5)
    elif values == "bf16":
        stream = np.resize(VALUES, count)
        arrays["values"] = stream.reshape(2, 5) if packing == "dense" else stream
    else:
        meta |= ASYMMETRIC if values == "int8" else GRID
        arrays["scales"] = SCALES
        if values == "int8":
            arrays["zero_points"] = ZERO_POINTS
            arrays["codes"] = np.arange(count, dtype=np.uint8)
        elif values == "int4" and packing == "dense":
            arrays["codes"] = np.array([0x21, 0x43, 0x05, 0x21, 0x43, 0x05], dtype=np.uint8)
        elif values == "int4":
            arrays["codes"] = np.array([0x21, 0x43, 0x05 if count % 2 else 0x65], dtype=np.uint8)
        elif packing == "dense":  # five codes of 3 or 2 bits in two bytes
            arrays["codes"] = np.array([0x9C, 0x02, 0x63, 0x01], dtype=np.uint8)
        else:  # five or six codes; of six codes of 3 bits, the last two bits are in a third byte
            arrays["codes"] = np.array([0x9C, 0x02, 0x03][: (count * int(values[3:]) + 7) // 8], dtype=np.uint8)
        if packing == "dense":
            arrays["codes"] = arrays["codes"].reshape(2, -1)
    return meta, arrays


def codebook_example(format):
    scales = SCALES
    match format:
        case "ternary-v1":
            return {"shape": [2, 4], "group_size": 32}, {
                "codes": np.array([[80], [0]], dtype=np.uint8),
                "scales": scales,
            }
        case "binary-v1":
            return {"shape": [2, 5], "group_size": None}, {
                "codes": np.array([[0b10101], [0b11111]], dtype=np.uint8),
                "scales": scales,
            }
        case "lut4-v1":
            return {"shape": [2, 5], "group_size": 32, "scaled": True}, {
                "codes": np.array([[0x21, 0x43, 0x0F], [0xFF, 0, 0]], dtype=np.uint8),
                "table": np.linspace(-255, 255, 16, dtype=np.float32),
                "scales": scales,
            }
        case _:
            return {"shape": [2, 5], "group_size": None, "scaled": False}, {
                "codes": np.arange(10, dtype=np.uint8).reshape(2, 5) * np.uint8(28),
                "table": np.arange(256, dtype=np.uint16) * np.uint16(128 + 1) % np.uint16(0x7F80),
            }


def changed(array, index, value):
    result = array.copy()
    result[index] = value
    return result
