# SPDX-License-Identifier: Apache-2.0
"""A plan as JSON."""

from typing import Any

from plan_memory import added_bytes
from plan_prediction import Prediction
from plan_report import Plan


def to_json(plan: Plan) -> dict[str, Any]:
    """All figures, of the settings that are beaten by others too."""
    advice = plan.recommendation
    settled = advice.plan
    return {
        "job": vars(plan.job) | {"flops_a_token": plan.job.flops_a_token},
        "links": [
            {"from": one, "to": other, "mbit": link.onward.bits_a_second / 1e6,
             "latency_ms": link.onward.latency * 1e3, "mbit_back": link.back.bits_a_second / 1e6,
             "latency_back_ms": link.back.latency * 1e3}
            for one, other, link in plan.ends
        ],
        "device_flops": plan.machine.flops,
        "device_speed": plan.speed,
        "gaps": {"file": str(plan.gaps.path), "tokens": plan.gaps.tokens,
                 "hidden_size": plan.gaps.hidden_size, "stages": plan.gaps.stages,
                 "ignored": plan.gaps.ignored},
        "refused": plan.refused,
        "settings": [_figures(prediction) for prediction in plan.predictions],
        "recommendation": {
            "max_gap": advice.budget,
            "measured_as": None if advice.measured is None else advice.measured.name,
            "boundaries": [] if settled is None else [
                {"rank": rank, "forward_codec": forward, "backward_codec": backward,
                 "measured_as": None if setting is None else setting.name}
                for setting, rank, forward, backward in zip(
                    advice.boundaries, settled.ranks, settled.forward_codecs,
                    settled.backward_codecs, strict=True)
            ],
            **_figures(advice.prediction),
            "flags": advice.command_line,
            "added_memory_bytes": added_bytes(advice.prediction),
        },
    }  # fmt: skip


def _figures(prediction: Prediction) -> dict[str, Any]:
    computation, bubble, network = prediction.shares
    return {
        "setting": prediction.setting.name,
        "flags": prediction.setting.command_line,
        "gap": prediction.setting.gap,
        "ratio": prediction.ratio,
        "step_seconds": prediction.seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "bubble": prediction.course.bubble,
        "seconds": {"computation": computation, "bubble": bubble, "network": network},
        "sent_bytes": prediction.sent,
        "bottleneck": prediction.bottleneck,
    }
