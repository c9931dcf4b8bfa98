# SPDX-License-Identifier: Apache-2.0
"""Packed codes and random numbers by counter, against plain Python integers."""

import pytest
import torch

from mapl.codecs.bits import pack_bits, packed_bytes, unpack_bits
from mapl.codecs.counter_random import gaussian, hash64, stream_key, uniform

CPU = torch.device("cpu")


def plain_pack(codes: list[int], bits: int) -> list[int]:
    number = sum(code << (place * bits) for place, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packing_is_one_long_little_endian_number(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    for count in (0, 1, 2, 3, 7, 8, 9, 1001):
        codes = torch.randint(0, 2**bits, (count,), generator=generator, dtype=dtype)
        if count:
            codes[-1] = 2**bits - 1
        data = pack_bits(codes, bits)
        assert data.dtype == torch.uint8 and data.numel() == packed_bytes(count, bits)
        assert data.tolist() == plain_pack(codes.tolist(), bits)
        assert unpack_bits(data, bits, count).tolist() == codes.tolist()


def test_packed_codes_may_stand_anywhere():
    data = torch.cat([torch.zeros(1, dtype=torch.uint8), pack_bits(torch.arange(9), 16)])
    assert unpack_bits(data[1:], 16, 9).tolist() == list(range(9))


def test_wrong_sizes_are_refused():
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"codes of {bits} bits"):
            packed_bytes(8, bits)
    with pytest.raises(ValueError, match="3 bytes do not hold 3 codes of 4 bits, which take 2"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 3)


def plain_hashes(key: int, count: int) -> list[int]:
    outputs = []
    for index in range(1, count + 1):
        x = (key + index * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(x ^ (x >> 31))
    return outputs


def test_hashes_are_those_of_splitmix64():
    # The values that every implementation of it is tried on.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x % 2**64 for x in hash64(1234567, 5, CPU).tolist()] == expected
    for key in (0, 1, 2**63, 2**64 - 1):
        assert [x % 2**64 for x in hash64(key, 50, CPU).tolist()] == plain_hashes(key, 50)


def test_uniform_numbers_are_the_halves_of_the_hashes():
    for count in (1, 2, 7, 40):
        expected = []
        for word in plain_hashes(99, count):
            expected += [(word >> 8 & 0xFFFFFF) / 2**24, (word >> 40) / 2**24]
        got = uniform(99, count, CPU)
        assert got.dtype == torch.float32 and got.tolist() == expected[:count]


def test_known_keys_and_numbers():
    """So that another implementation can be compared."""
    key = 17670481865470212032
    assert stream_key(7, 3) == key == plain_hashes(plain_hashes(7, 1)[0] + 3, 1)[0]
    assert uniform(key, 4, CPU).mul(2**24).tolist() == [13804005, 13675566, 5842485, 1844310]
    sums = [sum(word.to_bytes(8, "little")) for word in plain_hashes(key, 2)]
    expected = [(total - 1020) / (8 * 65535 / 12) ** 0.5 for total in sums]
    assert gaussian(key, 2, CPU).tolist() == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx([2.2198670, -2.4782135], rel=1e-6)


def test_keys_tell_all_their_words_apart():
    words = [(a, b) for a in range(-3, 40) for b in range(-3, 40)]
    keys = {stream_key(*pair) for pair in words} | {stream_key(a) for a in range(-3, 40)}
    assert len(keys) == len(words) + 43 and all(0 <= key < 2**64 for key in keys)


def test_uniform_numbers_are_uniform():
    count = 2**17
    numbers = uniform(stream_key(1, 2), count, CPU).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    # χ² with 255 degrees of freedom: 1e-6 of all seeds lie above 377.
    cells = torch.histc(numbers, 256, 0, 1)
    assert float(((cells - count / 256) ** 2 / (count / 256)).sum()) < 377
    for step in (1, 2, 64):  # neighbours and rows are independent
        assert abs(correlation(numbers[:-step], numbers[step:])) < 5 / count**0.5


@pytest.mark.parametrize("other", [(1, 3), (1, 1 << 20), (2, 2), (0, 2)])
def test_payloads_and_seeds_are_independent(other):
    count = 2**16
    first, second = (uniform(stream_key(*key), count, CPU).double() for key in ((1, 2), other))
    assert abs(correlation(first, second)) < 5 / count**0.5
    assert float((first == second).double().mean()) < 1e-3


def test_gaussian_numbers_are_nearly_gaussian():
    numbers = gaussian(5, 2**16, CPU).double()
    assert abs(float(numbers.mean())) < 0.02 and abs(float(numbers.var()) - 1) < 0.03
    assert abs(float((numbers**4).mean()) - 3) < 0.3 and abs(float((numbers**3).mean())) < 0.1


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])
