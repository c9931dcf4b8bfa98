# SPDX-License-Identifier: Apache-2.0
"""How fast a device computes: given, from the log of a run, or measured on this machine."""

import re
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from plan_job import Job
from plan_prediction import unlimited_seconds
from plan_settings import Setting
from training_log import TrainingLog

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_THROUGHPUT = re.compile(r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)")

#: Of a measurement: seconds, and steps beforehand that are not counted.
_SECONDS, _WARM_UP = 3.0, 3


def from_throughput(log: Path) -> float:
    """FLOP/s of a device, as Megatron's `--log-throughput` has it: the median of a run's lines.

    Raises:
        ValueError: the log has none.
    """
    found = [float(number) for number in _THROUGHPUT.findall(_text(log, "--throughput-log"))]
    if not found:
        raise ValueError(
            f"--throughput-log {log} has no line with 'throughput per GPU'; train with "
            "--log-throughput"
        )
    return statistics.median(found) * 1e12


def from_steps(log: Path, job: Job, devices: float | None) -> float:
    """FLOP/s of a device with which this job, uncompressed, takes the median step of a log.

    Args:
        log: of the planned job, trained where its network costs nothing.
        devices: see `Step`.

    Raises:
        ValueError: the log has no steps.
    """
    seen = TrainingLog.of(_text(log, "--step-log").splitlines())
    if not seen.steps:
        raise ValueError(
            f"--step-log {log} has no line with 'elapsed time per iteration'; give the output of "
            "the last stage of a training"
        )
    return unlimited_seconds(job, Setting("uncompressed", {}), devices) / seen.median_step


def _text(log: Path, flag: str) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError as error:
        raise ValueError(f"{flag} {log}: {error.strerror}; name the log of a training") from None


def measure(job: Job) -> float:
    """FLOP/s of this machine's GPU, or of its CPU, at one layer of the job, in plain torch.

    The whole layer, in the job's dtype. `predict` takes tensor-parallel ranks to share it evenly,
    and their all-reduces to cost nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _DTYPES[job.dtype]
    layer = _Layer(job).to(device, dtype)
    shape = (job.micro_batch_size, job.seq_length, job.hidden_size)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < _WARM_UP + 2 or time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        layer(x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - before)
    flops = job.layer_flops * job.micro_batch_tokens
    return flops / statistics.median(seconds[_WARM_UP:])


class _Layer(nn.Module):
    """A layer of the job, as a LLaMA has it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        d, self._heads = job.hidden_size, job.num_attention_heads
        self._head = job.kv_channels or d // self._heads
        self._groups = job.num_query_groups or self._heads
        self._sizes = [n * self._head for n in (self._heads, self._groups, self._groups)]
        self.norms = nn.ModuleList([nn.RMSNorm(d), nn.RMSNorm(d)])
        self.qkv = nn.Linear(d, sum(self._sizes), bias=False)
        self.out = nn.Linear(self._sizes[0], d, bias=False)
        self._gated = job.swiglu
        self.up = nn.Linear(d, job.ffn_width * (2 if job.swiglu else 1), bias=False)
        self.down = nn.Linear(job.ffn_width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] → [b, s, d]."""
        q, k, v = (
            part.unflatten(-1, (-1, self._head)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(self._sizes, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self._groups != self._heads
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden = self.up(self.norms[1](x))
        if self._gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * value
        else:
            hidden = functional.gelu(hidden)
        out: Tensor = x + self.down(hidden)
        return out
