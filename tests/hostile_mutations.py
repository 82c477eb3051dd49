"""Ways to damage a file: its bytes, or what they mean, where the format is known."""

import io
import json
import math
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from defi.data.rlds.tfrecord import masked_crc
from defi.data.rlds.write import record


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, zero, repeat or exchange some bytes."""
    if not data:
        return chance.randbytes(chance.randrange(100))
    kind = chance.randrange(8)
    at = chance.randrange(len(data))
    if kind <= 2:  # near the start, where headers are, as often as anywhere
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            limit = chance.choice((16, 256, len(changed)))
            changed[chance.randrange(min(limit, len(changed)))] = chance.randrange(256)
        return bytes(changed)
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + chance.choice((b"\0", b"\xff")) * min(64, len(data) - at) + data[at + 64 :]
    if kind == 5:
        return data[:at] + data[max(0, at - 100) :]
    if kind == 6:
        return data[:at] + chance.randbytes(chance.randrange(1, 100)) + data[at:]
    size = chance.choice((2, 4, 8))
    at = chance.choice((0, at))
    number = chance.choice((2**31 - 1, 2**63 - 1, 10**9, 2 ** (8 * size) - 1)) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


EVIL: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**6, 10**12, 10**30, 1e308, math.nan, "", "x" * 10_000, "../../../../etc/passwd"),
    *("/etc/passwd", "\0", "${oc.env:HOME}", "<script>alert(1)</script>", [], {}, [[[[]]]], {"a": {"b": {}}}),
    {"_target_": "os.system", "_args_": ["touch pwned"]},
)


def damage_values(values: Any, chance: random.Random) -> Any:
    """Replace, remove or repeat a value somewhere inside containers."""
    spots = list(_spots(values))
    if not spots:
        return chance.choice(EVIL)
    container, key = chance.choice(spots)
    kind = chance.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container[key], (int, float)):
        container[key] *= chance.choice((-1, 1000, 10**7, 0.5))
    elif kind == 2 and isinstance(container, list):
        container += [container[key]] * chance.choice((1, 1000))
    else:
        container[key] = chance.choice(EVIL)
    return values


def _spots(values: Any) -> Iterator[tuple[Any, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield values, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


def damage(name: str, data: bytes, chance: random.Random) -> bytes:
    """A damaged version of a file: of what it means, where its format is known, or of its bytes."""
    suffix = Path(name).suffix
    if chance.random() < 0.4:
        return damage_bytes(data, chance)
    if suffix == ".json":
        if chance.random() < 0.05:
            return chance.choice(
                (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"null", b'"text"', b"[1]")
            )
        return json.dumps(damage_values(json.loads(data), chance)).encode()
    if suffix == ".yaml":
        return chance.choice(YAMLS) if chance.random() < 0.3 else damage_bytes(data, chance)
    if suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(damage_values(json.loads(data[8 : 8 + size]), chance)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if suffix in (".npz", ".pt"):
        return damage_member(data, chance)
    if suffix == ".npy":
        return damage_header(data, chance)
    if suffix.startswith(".tfrecord"):
        return damage_records(data, chance)
    return damage_bytes(data, chance)


YAMLS = (
    b"!!python/object/apply:os.system ['touch pwned']",
    b"a: !!python/name:os.system",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n".encode() for p, n in zip("abcdefgh", "bcdefghi")),
    b"_target_: os.system\n_args_: [touch pwned]",
    b"a: ${oc.env:HOME}\nb: ${c}\nc: ${b}",
    b"[" * 3000,
    b"- 1\n- 2",
    b"just text",
    b"",
)


def damage_header(data: bytes, chance: random.Random) -> bytes:
    """A `.npy` file with another type or shape in its header."""
    shape = chance.choice(
        ("(10**9,)", "(1000000000000,)", "(-1,)", "()", "(2, 3)", "(0, 2)", "'x'", "(1.5,)")
    )
    dtype = chance.choice(("'<f8'", "'|O'", "'<U1000000000'", "'|V0'", "[('a', '<i8')]", "'<i8'", "None"))
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    start = 10 + int.from_bytes(data[8:10], "little") if len(data) > 10 else len(data)
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data[start:]


def damage_member(data: bytes, chance: random.Random) -> bytes:
    """A zip archive with one member damaged, and checksums that fit it; or one that grows when it is read."""
    out, bomb = io.BytesIO(), chance.random() < 0.02
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        target = chance.choice(names)
        for name in names:
            content = old.read(name)
            if name == target:
                content = (
                    damage_header(content, chance) if name.endswith(".npy") else damage_bytes(content, chance)
                )
                if bomb:
                    content = content[:128] + bytes(2**28)
            new.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
    return out.getvalue()


def damage_records(data: bytes, chance: random.Random) -> bytes:
    """TFRecords removed, repeated, exchanged, of lying length or with damaged data; checksums fit."""
    records, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        records.append(data[at + 12 : at + 12 + size])
        at += size + 16
    target = chance.randrange(len(records))
    kind = chance.randrange(8)
    if kind == 0:
        del records[target]
    elif kind == 1:
        records[target : target + 1] *= chance.choice((2, 100))
    elif kind == 2:
        chance.shuffle(records)
    elif kind == 3:
        length = chance.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        lying = length + masked_crc(length).to_bytes(4, "little")
        return b"".join(map(record, records[:target])) + lying + records[target]
    else:
        records[target] = damage_bytes(records[target], chance)
    return b"".join(map(record, records))
