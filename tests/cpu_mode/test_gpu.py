# SPDX-License-Identifier: Apache-2.0
"""Jobs on GPUs: which one a process takes, and what is chosen for want of a package."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import GroupMember, ProcessGroup, ReduceOp, _make_nccl_premul_sum

from megatron.mapl import cpu

cpu.install()

from megatron.core.transformer.enums import AttnBackend  # noqa: E402

from megatron.mapl import gpu, pretraining  # noqa: E402

NOT_A_MEMBER: Any = GroupMember.NON_GROUP_MEMBER


def settle(monkeypatch: pytest.MonkeyPatch, processes: str, gpus: int, **more: Any) -> Any:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    args = SimpleNamespace(
        **{
            "distributed_backend": "nccl",
            "local_rank": 0,
            "transformer_impl": "local",
            "attention_backend": AttnBackend.auto,
            "reset_attention_mask": False,
            "create_attention_mask_in_dataloader": True,
            "world_size": int(processes),
            "data_parallel_size": 1,
            "context_parallel_size": 1,
            "tensor_model_parallel_size": 1,
            "num_experts": None,
            "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": 1,
            "num_layers": 4,
            "mtp_num_layers": None,
            "pipeline_model_parallel_size": 3,
            "pipeline_model_parallel_layout": None,
            **more,
        }
    )
    gpu.settle(args)
    return args


def test_processes_share_gpus_over_gloo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = [
        settle(monkeypatch, "5", 2, local_rank=rank, distributed_backend="gloo").local_rank
        for rank in range(5)
    ]
    assert numbers == [0, 1, 0, 1, 0]
    assert "5 processes share 2 GPU(s)" in capsys.readouterr().out


def test_nccl_wants_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle(monkeypatch, "2", 2, local_rank=1).local_rank == 1
    with pytest.raises(
        ValueError,
        match=r"--distributed-backend nccl .* 1 for 4; use --distributed-backend gloo.*"
        "CUDA_VISIBLE_DEVICES",
    ):
        settle(monkeypatch, "4", 1)


def test_gloo_takes_experts_without_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 4, "num_experts": 4}
    assert settle(monkeypatch, "8", 8, distributed_backend="gloo", **sizes).num_experts == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_distributed_optimizer": True}, "leave --use-distributed-optimizer out"),
        ({"use_layer_wise_distributed_optimizer": True}, "leave --use-distributed-optimizer out"),
        ({"overlap_grad_reduce": True}, "leave --overlap-grad-reduce out"),
        ({"overlap_param_gather": True}, "leave --overlap-param-gather out"),
        ({"use_ring_exchange_p2p": True}, "leave --use-ring-exchange-p2p out"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2 .*use --context-parallel-size 1"),
        ({"data_parallel_size": 4}, "4 data-parallel replicas.* start 1/4 of the 8 processes"),
        (
            {"num_experts": 4, "tensor_model_parallel_size": 4, "expert_model_parallel_size": 2},
            "2 replicas of each expert.* 4, the --tensor-model-parallel-size",
        ),
        (
            {"mtp_num_layers": 1, "pipeline_model_parallel_layout": "Etttt|m|L"},
            "put them into the last stage, before L",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_gloo_does_less_with_gpus(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    nccl = settle(monkeypatch, "8", 8, **change)
    assert nccl.distributed_backend == "nccl"
    with pytest.raises(ValueError, match=message) as raised:
        settle(monkeypatch, "8", 8, distributed_backend="gloo", **change)
    assert "on GPUs" in str(raised.value) and "--distributed-backend gloo" in str(raised.value)
    assert str(raised.value).endswith("or use --distributed-backend nccl")


def test_the_loader_builds_masks_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settle(monkeypatch, "1", 1).create_attention_mask_in_dataloader
    reset = settle(monkeypatch, "1", 1, reset_attention_mask=True)
    assert reset.create_attention_mask_in_dataloader


@pytest.mark.parametrize(("have_te", "implementation"), [(False, "local"), (True, None)])
def test_defaults(monkeypatch: pytest.MonkeyPatch, have_te: bool, implementation: Any) -> None:
    monkeypatch.setattr(gpu, "HAVE_TE", have_te)
    defaults = gpu.argument_defaults()
    assert defaults.get("transformer_impl") == implementation
    assert defaults["gradient_accumulation_fusion"] is False


def test_lonely_reductions() -> None:
    done: list[Any] = []

    def all_reduce(tensor: Any, **keywords: Any) -> str:
        done.append(tuple(keywords[name] for name in ("op", "group", "async_op")))
        return "work"

    reduce = gpu.without_lonely_reductions(all_reduce)
    tensor = torch.ones(3)
    alone, pair = ProcessGroup(0, 1), ProcessGroup(0, 2)
    assert reduce(tensor, group=alone) is None
    assert reduce(tensor, ReduceOp.MAX, alone) is None
    assert done == []
    scaled = _make_nccl_premul_sum(2.0)
    calls = [
        ((ReduceOp.SUM, alone, True), {"group": alone, "async_op": True}),
        ((scaled, alone, False), {"op": scaled, "group": alone}),
        ((ReduceOp.MAX, pair, False), {"op": ReduceOp.MAX, "group": pair}),
        ((ReduceOp.SUM, None, False), {}),
        ((ReduceOp.SUM, NOT_A_MEMBER, False), {"group": NOT_A_MEMBER}),
    ]
    for _, keywords in calls:
        assert reduce(tensor, **keywords) == "work"
    assert done == [passed_on for passed_on, _ in calls]


@pytest.mark.parametrize(
    ("staged", "cpu_mode", "expected"),
    [
        (True, False, ["close", "leave"]),
        (False, True, ["close", "leave"]),
        (False, False, ["close"]),
    ],
)
def test_over_gloo_processes_leave_together(
    monkeypatch: pytest.MonkeyPatch, staged: bool, cpu_mode: bool, expected: list[str]
) -> None:
    """Without asking a process group, which may have ended."""
    called: list[str] = []
    monkeypatch.setattr(pretraining, "leave_together", lambda: called.append("leave"))
    links: Any = SimpleNamespace(staged=staged, close=lambda: called.append("close"))
    job = pretraining.Job(cpu_mode=cpu_mode)
    job._links = links
    job._finish_and_leave()
    assert called == expected


def test_one_model_has_boundaries() -> None:
    job = pretraining.Job(cpu_mode=True)
    job._args, job._links = SimpleNamespace(), SimpleNamespace()  # type: ignore[assignment]
    job._prepare()  # plain Megatron may train again, for instance after an in-process restart
    job._runtime = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"pretrain a second time, .*; train one model"):
        job._prepare()
