# SPDX-License-Identifier: Apache-2.0
"""The links and the devices of a plan, given or measured."""

import dataclasses
from pathlib import Path

import pytest
import torch

import link_measurements
import plan_device
import plan_links
from link_measurements import Measured, Measurements
from pipeline_step import Direction, Link
from plan_job import Job
from plan_prediction import unlimited_seconds
from plan_settings import Setting
from tests.unit.plan_cases import JOB


def test_measured_links(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    link = Measured(0, 1, 90.0, 80.0, 3.0, 0.01)
    back = Measured(1, 0, 50.0, 40.0, 4.0, 0.01)
    Measurements("gloo", ["a", "b"], [link, back]).write(path)
    (found,) = plan_links.measured(path, 2, 1)
    assert found == Link(Direction(80e6, 3e-3), Direction(40e6, 4e-3))
    with pytest.raises(ValueError, match="has 2 ranks and no measurement from 1 to 2"):
        plan_links.measured(path, 3, 2)
    path.write_text(path.read_text().replace("80.0", "0.0"))
    with pytest.raises(ValueError, match=r"rank 0 to 1 has 0\.0 Mbit/s"):
        link_measurements.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"not what tools/measure_links\.py writes"):
        link_measurements.read(path)


def log_line(number: int, ms: float) -> str:
    return (
        f" iteration {number:8d}/ 100 | consumed samples: 16 | elapsed time per iteration (ms): "
        f"{ms} | throughput per GPU (TFLOP/s/GPU): {ms / 10} | lm loss: 5.0E+00 |\n"
    )


def test_the_speed_of_a_device_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(log_line(n, ms) for n, ms in [(1, 9000.0), (2, 1500.0), (3, 1000.0)]))
    assert plan_device.from_throughput(log) == pytest.approx(150e12)
    flops = plan_device.from_steps(log, JOB, None)
    # By the speed that follows, the job takes the median step where its network costs nothing.
    plain = Setting("uncompressed", {})
    seen = plan_device.TrainingLog.of(log.read_text().splitlines()).median_step
    assert unlimited_seconds(JOB, plain, None) / flops == pytest.approx(seen)
    log.write_text("nothing\n")
    with pytest.raises(ValueError, match="--log-throughput"):
        plan_device.from_throughput(log)
    with pytest.raises(ValueError, match="no line with 'elapsed time per iteration'"):
        plan_device.from_steps(log, JOB, None)


@pytest.mark.parametrize("swiglu", [True, False])
def test_the_speed_of_this_machine(monkeypatch: pytest.MonkeyPatch, swiglu: bool) -> None:
    monkeypatch.setattr(plan_device, "_SECONDS", 0.0)
    small = Job(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, seq_length=32,
        vocab_size=100, micro_batch_size=2, global_batch_size=2, swiglu=swiglu,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    assert 1e5 < plan_device.measure(small) < 1e16
    layer = plan_device._Layer(small)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    attention = 6 * small.hidden_size * small.seq_length
    assert 6 * weights + attention == small.layer_flops


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_measured_in_the_dtype_of_the_job(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    seen = set()
    forward = plan_device._Layer.forward

    def noted(self: plan_device._Layer, x: torch.Tensor) -> torch.Tensor:
        seen.update({x.dtype, *(p.dtype for p in self.parameters())})
        return forward(self, x)

    monkeypatch.setattr(plan_device, "_SECONDS", 0.0)
    monkeypatch.setattr(plan_device._Layer, "forward", noted)
    small = Job(
        num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=100,
        micro_batch_size=2, global_batch_size=2, pipeline_model_parallel_size=2, dtype=dtype,
    )  # fmt: skip
    assert plan_device.measure(small) > 0
    assert seen == {torch.bfloat16 if dtype == "bf16" else torch.float32}


@pytest.mark.parametrize(
    ("processes", "virtual", "links"), [(2, 1, 1), (2, 2, 1), (3, 1, 2), (3, 2, 3), (4, 2, 4)]
)
def test_how_many_links_a_job_uses(processes: int, virtual: int, links: int) -> None:
    job = dataclasses.replace(
        JOB, num_layers=24, global_batch_size=24, pipeline_model_parallel_size=processes,
        num_virtual_stages_per_pipeline_rank=virtual,
    )  # fmt: skip
    assert job.links == links
