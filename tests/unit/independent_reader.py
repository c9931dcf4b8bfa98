# SPDX-License-Identifier: Apache-2.0
"""Reads and writes payloads by docs/wire-format.md alone, with struct and numpy.

It imports nothing of this project: what it understands is what the page says.
"""

import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np

MAGIC = b"MAPL"
DTYPES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
_GAMMA, _ALL = 0x9E3779B97F4A7C15, 2**64 - 1
LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e5m2": 57344.0}


@dataclass
class Payload:
    boundary: int
    direction: int
    sequence: int
    ids: list[int]
    body: bytes


def aligned(size: int) -> int:
    return -(-size // 8) * 8


def checksum(data: bytes) -> int:
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    return sum(word * (2 * i + 1) for i, word in enumerate(words)) & _ALL


def id_size(vocabulary: int) -> int:
    return max(1, -(-(vocabulary - 1).bit_length() // 8))


def read(data: bytes, count: int, vocabulary: int, body_bytes: int) -> Payload:
    """Takes a payload of `count` ids and a body of so many bytes apart, checking all of it."""
    magic, version, place, sequence, total = struct.unpack_from("<4siqqq", data)
    assert (magic, version, total, len(data) % 8) == (MAGIC, 1, len(data), 0)
    assert checksum(data[:-8]) == struct.unpack("<Q", data[-8:])[0]
    size = id_size(vocabulary)
    ids = [int.from_bytes(data[32 + i * size :][:size], "little") for i in range(count)]
    assert all(0 <= one < vocabulary for one in ids)
    start = 32 + aligned(count * size)
    assert len(data) == start + aligned(body_bytes) + 8
    assert not any(data[32 + count * size : start] + data[start + body_bytes : -8])
    return Payload(place >> 8, place & 255, sequence, ids, data[start : start + body_bytes])


def write(payload: Payload, vocabulary: int) -> bytes:
    size = id_size(vocabulary)
    ids = b"".join(one.to_bytes(size, "little") for one in payload.ids)
    inner = ids.ljust(aligned(len(ids)), b"\0")
    inner += payload.body.ljust(aligned(len(payload.body)), b"\0")
    place = payload.boundary * 256 + payload.direction
    head = struct.pack("<4siqqq", MAGIC, 1, place, payload.sequence, 32 + len(inner) + 8)
    return head + inner + struct.pack("<Q", checksum(head + inner))


def numbers(data: bytes, dtype: str) -> np.ndarray:
    raw = np.frombuffer(data, DTYPES[dtype])
    if dtype == "bf16":
        return (raw.astype("<u4") << 16).view("<f4")
    return raw.astype(np.float32)


def eight_bit_floats(data: bytes, kind: str) -> np.ndarray:
    exponent_bits, bias = {"e4m3": (4, 7), "e5m2": (5, 15)}[kind]
    mantissa_bits = 7 - exponent_bits
    table = np.empty(256, np.float32)
    for code in range(256):
        exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
        fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
        value = math.ldexp(fraction + (exponent > 0), max(exponent, 1) - bias)
        top = exponent == (1 << exponent_bits) - 1
        if (kind == "e5m2" and top and fraction) or (kind == "e4m3" and code & 127 == 127):
            value = math.nan
        elif kind == "e5m2" and top:
            value = math.inf
        table[code] = -value if code & 128 else value
    return table[np.frombuffer(data, np.uint8)]


def scaled(body: bytes, n: int, w: int, kind: str, group: int) -> np.ndarray:
    """fp8 (e4m3, e5m2), int8 and int4: [n, w] before it is rounded to the model's dtype."""
    groups = -(-w // min(group, w))
    scales = numbers(body[: 2 * n * groups], "bf16").reshape(n, groups)
    data = body[2 * n * groups :]
    if kind == "int4":
        octets = np.frombuffer(data, np.uint8)
        codes = np.stack([octets & 15, octets >> 4], 1).ravel()[: n * w].astype(np.float32) - 8
    elif kind == "int8":
        codes = np.frombuffer(data, np.int8).astype(np.float32)
    else:
        codes = eight_bit_floats(data, kind)
    return codes.reshape(n, w) * np.repeat(scales, min(group, w), 1)[:, :w]


def groups_scaled(rows: np.ndarray, kind: str, group: int) -> tuple[bytes, np.ndarray]:
    """The scales of rows [n, w] fp32, as they are sent, and the rows over their scales."""
    n, w = rows.shape
    g = min(group, w)
    largest = np.pad(np.abs(rows), ((0, 0), (0, -w % g))).reshape(n, -1, g).max(2)
    scales = np.maximum(largest * np.float32(1 / LARGEST[kind]), np.float32(2.0**-126))
    upper = (scales.view(np.uint32) + 0xFFFF >> 16).astype("<u2").tobytes()
    return upper, rows / np.repeat(numbers(upper, "bf16").reshape(n, -1), g, 1)[:, :w]


def encode_integers(
    rows: np.ndarray, kind: str, group: int, chances: np.ndarray | None = None
) -> bytes:
    """The body of int8 and int4 for rows [n, w] fp32; `chances` [n, w] round gradients."""
    upper, ratio = groups_scaled(rows, kind, group)
    if chances is None:
        codes = np.rint(ratio)
    else:
        codes = np.floor(ratio) + (chances < ratio - np.floor(ratio))
    if kind == "int8":
        return upper + codes.astype(np.int8).tobytes()
    nibbles = np.append(codes.ravel() + 8, [0] * (codes.size % 2)).astype(np.uint8)
    return upper + (nibbles[::2] | nibbles[1::2] << 4).tobytes()


def encode_eight_bit_floats(rows: np.ndarray, kind: str, group: int) -> bytes:
    """The body of fp8 for rows [n, w] fp32: the nearest code, of two the even one."""
    upper, ratio = groups_scaled(rows, kind, group)
    values = eight_bit_floats(bytes(range(128)), kind)
    values = values[np.isfinite(values)].astype(np.float64)  # which ascend with their codes
    magnitude = np.minimum(np.abs(ratio), LARGEST[kind]).astype(np.float64)
    above = np.searchsorted(values, magnitude)
    below = np.maximum(above - 1, 0)
    up, down = values[above] - magnitude, magnitude - values[below]
    codes = np.where((up < down) | (up == down) & (above % 2 == 0), above, below)
    return upper + (codes + 128 * np.signbit(ratio)).astype(np.uint8).tobytes()


def encode_topk(rows: np.ndarray, k: int) -> bytes:
    """The body of topk for rows [n, w] fp32."""
    columns = np.sort(np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :k], axis=1)
    values = np.take_along_axis(rows, columns, 1)
    return values.astype("<f4").tobytes() + columns.astype("<u2").tobytes()


def encode_lowrank(p: np.ndarray, q: np.ndarray) -> bytes:
    """The body of lowrank, in fp32, for the gradient P Qᵀ: P [n, q], Q [w, q]."""
    c = np.float32(2.0 ** math.ceil(math.log2(len(p)) / 2))
    return (c * p).astype("<f4").tobytes() + (q / c).astype("<f4").tobytes()


def topk(body: bytes, n: int, w: int, k: int, dtype: str) -> np.ndarray:
    values = numbers(body[: n * k * DTYPES[dtype].itemsize], dtype).reshape(n, k)
    columns = np.frombuffer(body[n * k * DTYPES[dtype].itemsize :], "<u2").reshape(n, k)
    assert (np.diff(columns.astype(int), axis=1) > 0).all()
    rows = np.zeros((n, w), np.float32)
    np.put_along_axis(rows, columns.astype(int), values, 1)
    return rows


def lowrank(body: bytes, n: int, w: int, q: int, dtype: str) -> np.ndarray:
    both = numbers(body, dtype).reshape(n + w, q)
    c = np.float32(2.0 ** math.ceil(math.log2(n) / 2))
    return (both[:n] / c) @ both[n:].T * c


# Random numbers


def mix(x: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ x >> shift) * factor & _ALL
    return x


def key(*words: int) -> int:
    k = 0
    for word in words:
        k = mix((k + _GAMMA + word) & _ALL)
    return k


def hashes(k: int, count: int) -> list[int]:
    return [mix((k + i * _GAMMA) & _ALL) for i in range(1, count + 1)]


def seed(job: int, purpose: str, index: int) -> int:
    return int.from_bytes(
        hashlib.sha256(f"{job}/{purpose}/{index}".encode()).digest()[:7], "little"
    )


def chances(codec: int, sender: int, number: int, count: int) -> np.ndarray:
    halves = np.array(hashes(key(key(codec, sender), number), -(-count // 2)), "<u8").view("<u4")
    return (halves[:count] >> 8).astype(np.float32) * np.float32(2.0**-24)


# Residual vector quantisation


@dataclass
class Codebooks:
    """A receiver's copy: G groups, R rounds, K codes, e entries a payload from each of T ranks."""

    groups: int
    rounds: int
    codes: int
    entries: int
    ranks: int
    shuffled: bool
    seed: int
    width: int
    dtype: str

    def __post_init__(self) -> None:
        v = self.width // self.groups
        shape = self.groups, self.rounds, self.codes, v
        octets = np.array(hashes(key(key(self.seed, 0)), math.prod(shape)), "<u8").view(np.uint8)
        total = octets.reshape(-1, 8).sum(1, dtype=np.int64) - 1020
        start = total.astype(np.float32) * np.float32((8 * (256**2 - 1) / 12) ** -0.5)
        start = start.reshape(shape)
        left = self.codes ** (-2 / v)
        for number in range(self.rounds):
            start[:, number] *= np.float32((left**number * (1 - left)) ** 0.5)
        if self.dtype == "bf16":
            bits = start.view(np.uint32)
            start = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
        elif self.dtype == "fp16":
            start = start.astype(np.float16).astype(np.float32)
        self.table = start

    def due(self, number: int) -> list[int]:
        count = self.entries * self.ranks
        return [self._at(place) for place in range(number * count, (number + 1) * count)]

    def _at(self, place: int) -> int:
        cycle, index = divmod(place, self.codes)
        if not self.shuffled:
            return index
        drawn = np.array(hashes(key(key(self.seed, 1), cycle), self.codes), np.uint64)
        return int(drawn.view(np.int64).argsort()[index])

    def decode(self, bodies: list[bytes], n: int, number: int) -> np.ndarray:
        """The rows [n, w] of the ranks' payloads together."""
        shape = self.groups, self.rounds, self.entries, self.table.shape[3]
        size = math.prod(shape) * DTYPES[self.dtype].itemsize
        due = self.due(number)
        for rank, body in enumerate(bodies):
            codes = due[rank * self.entries : (rank + 1) * self.entries]
            self.table[:, :, codes] = numbers(body[:size], self.dtype).reshape(shape)
        return np.concatenate([self._rows(body[size:], n // len(bodies)) for body in bodies])

    def encode(self, rows: np.ndarray, number: int, entries: np.ndarray) -> bytes:
        """The body, in fp32, for rows [n, w]; the entries [G, R, e, v] that are due are given."""
        n, (groups, rounds, count, v) = len(rows), self.table.shape
        self.table[:, :, self.due(number)] = entries
        root = np.sqrt((rows.astype(np.float64) ** 2).mean(1)).astype(np.float32)
        bits = root.view(np.uint32)
        scales = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2")
        sent = numbers(scales.tobytes(), "bf16")[:, None]
        left = (rows / np.where(sent > 0, sent, 1)).reshape(n, groups, v)
        codes = np.empty((n, groups, rounds), int)
        for number in range(rounds):
            distance = ((left[:, :, None] - self.table[None, :, number]) ** 2).sum(3)
            codes[:, :, number] = distance.argmin(2)
            left = left - self.table[np.arange(groups)[None], number, codes[:, :, number]]
        digits = codes[..., None] >> np.arange(count.bit_length() - 1) & 1
        packed = np.packbits(digits.astype(np.uint8).ravel(), bitorder="little")
        return entries.astype("<f4").tobytes() + scales.tobytes() + packed.tobytes()

    def _rows(self, data: bytes, n: int) -> np.ndarray:
        scales = numbers(data[: 2 * n], "bf16")
        stream = np.unpackbits(np.frombuffer(data[2 * n :], np.uint8), bitorder="little")
        bits, count = self.codes.bit_length() - 1, n * self.groups * self.rounds
        digits = stream[: count * bits].reshape(n, self.groups, self.rounds, bits)
        codes = (digits.astype(int) << np.arange(bits)).sum(3)
        total = np.zeros((n, self.groups, self.table.shape[3]), np.float32)
        for number in range(self.rounds):
            chosen = self.table[np.arange(self.groups)[None], number, codes[:, :, number]]
            total = chosen if number == 0 else total + chosen
        return total.reshape(n, self.width) * scales[:, None]


def share(data: bytes, index: int, count: int) -> bytes:
    """The part of once-a-step data that process `index` of `count` sends."""
    size = -(-len(data) // (8 * count)) * 8
    return data[index * size :][:size].ljust(size, b"\0")
