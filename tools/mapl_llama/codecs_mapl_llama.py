# SPDX-License-Identifier: Apache-2.0
"""What the wire does to latents: each codec's encoding and decoding in one, without the bytes.

Activations alone are coded here; rounding them is deterministic. Shapes: n tokens, w numbers each.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: No scale is smaller: dividing by a subnormal number could overflow.
SMALLEST_SCALE = 2.0**-126

_BF16_NAN, _BF16_MAX = 0x7FC0, 0x7F7F
_INDEX_BITS = 16


class Pipeline(nn.Module):
    """Sends the numbers as they are."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows


class Scaled(nn.Module):
    """x̂ = s·q(x / s), one scale s for each group of numbers of a token: int8, int4, fp8 (e4m3).

    s = max |x| / q_max, rounded up to bf16; NaN for a group that is not finite.
    """

    largest: ClassVar[dict[str, float]] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}

    def __init__(self, name: str, width: int, group_size: int) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.group_size = min(group_size, width)
        self.groups = -(-width // self.group_size)

    def forward(self, rows: Tensor) -> Tensor:
        largest, wide = self.largest[self.name], rows.float()
        padded = F.pad(wide.abs(), (0, self.groups * self.group_size - self.width))
        maxima = padded.reshape(-1, self.groups, self.group_size).amax(2)
        scales = _bf16(maxima * (1 / largest), nearest=False, smallest=SMALLEST_SCALE)
        spread = scales.repeat_interleave(self.group_size, dim=1)[:, : self.width]
        ratio = torch.nan_to_num(wide / spread, nan=0.0).clamp_(-largest, largest)
        coded = ratio.to(torch.float8_e4m3fn).float() if self.name == "fp8" else ratio.round()
        return _clamped(coded * spread, rows.dtype)


class TopK(nn.Module):
    """Keeps the k numbers of largest magnitude of each token, the others become 0."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, rows: Tensor) -> Tensor:
        # The bits of floats without their sign are integers in the order of their magnitudes; of
        # equal ones the lower column comes first. NaNs are all alike.
        integers = torch.int16 if rows.dtype.itemsize == 2 else torch.int32
        infinity = torch.tensor(float("inf"), dtype=rows.dtype).view(integers).item()
        magnitudes = rows.contiguous().view(integers) & torch.iinfo(integers).max
        magnitudes = magnitudes.clamp(max=int(infinity) + 1).long()
        backwards = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
        columns = ((magnitudes << _INDEX_BITS) + backwards).topk(self.kept, dim=1).indices
        return torch.zeros_like(rows).scatter(1, columns, rows.gather(1, columns))


class ResidualVQ(nn.Module):
    """x̂ = s·Σ_ρ c_ρ: in each round ρ the entry next to what the rounds before have left.

    s is the root mean square of a token's numbers in bf16. The codebook [G, R, K, v] is the one
    that both ends of the boundary held when the checkpoint was saved.
    """

    def __init__(self, width: int, groups: int, rounds: int, codes: int) -> None:
        super().__init__()
        self.groups, self.size = groups, width // groups
        codebook = torch.zeros(groups, rounds, codes, self.size)
        self.codebook = nn.Parameter(codebook, requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        wide, codebook = rows.float(), self.codebook.float()
        largest = wide.abs().amax(1, keepdim=True)
        unit = largest.clamp(min=SMALLEST_SCALE)
        rms = (unit * (wide / unit).square().mean(1, keepdim=True).sqrt()).clamp(SMALLEST_SCALE)
        scales = _bf16(torch.where(largest == 0, 0.0, rms), nearest=True)
        left = torch.nan_to_num(wide / scales, nan=0.0).view(-1, self.groups, self.size)
        total = torch.zeros_like(left)
        offsets = codebook.square().sum(3).mul_(0.5)
        group = torch.arange(self.groups, device=rows.device)
        for number in range(codebook.shape[1]):
            entries = codebook[:, number]
            scores = torch.baddbmm(
                offsets[:, number, None], left.transpose(0, 1), entries.transpose(1, 2), beta=-1
            )
            chosen = entries[group, scores.argmax(2).T]
            left, total = left - chosen, total + chosen
        return _clamped(total.view(rows.shape) * scales, rows.dtype)


def build_codec(name: str, width: int, sizes: dict[str, Any]) -> nn.Module:
    """The forward codec of one boundary; `sizes` are the configuration's `mapl_codec`."""
    if name == "pipeline":
        return Pipeline()
    if name in Scaled.largest:
        return Scaled(name, width, sizes["group_size"])
    if name == "topk":
        return TopK(sizes["topk"])
    if name == "rvq":
        return ResidualVQ(width, sizes["rvq_groups"], sizes["rvq_rounds"], sizes["rvq_codes"])
    raise ValueError(f"mapl_boundaries: codec {name!r} is unknown to this modelling code")


def _bf16(values: Tensor, *, nearest: bool, smallest: float = 0.0) -> Tensor:
    """fp32 numbers ≥ 0 rounded to bf16, to the nearest or up; NaN if they are not finite."""
    bits = values.clamp(min=smallest).view(torch.int32)
    upper = (bits + (0x7FFF + ((bits >> 16) & 1) if nearest else 0xFFFF)) >> 16
    rounded = torch.where(values.isfinite(), upper.clamp(max=_BF16_MAX), _BF16_NAN)
    return rounded.to(torch.int16).view(torch.bfloat16).float()


def _clamped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype; what its finite range does not hold becomes its largest number."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)
