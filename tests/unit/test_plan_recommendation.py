# SPDX-License-Identifier: Apache-2.0
"""Which setting each boundary is given."""

import dataclasses

import pytest

from plan_prediction import predict
from plan_recommendation import TOLERANCE, recommend
from tests.unit.plan_cases import GAPS, JOB, VIRTUAL, machine


def test_recommends_the_fastest_within_the_budget() -> None:
    settings = GAPS.carried_over(1024)
    slow = machine(100)
    seconds = []
    for budget in (1.0, 2.0, 3.0, 10.0):
        advice = recommend(JOB, slow, settings, budget)
        assert advice.measured is not None and advice.measured.gap is not None
        assert advice.measured.gap <= budget
        assert advice.plan is not None and min(advice.plan.ranks) > 0
        faster = [
            s.name for s in settings
            if s.gap is not None and s.gap <= budget
            and predict(JOB, s, slow).seconds < 0.98 * advice.prediction.seconds
        ]  # fmt: skip
        assert not faster
        seconds.append(advice.prediction.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


def test_nothing_is_compressed_where_the_network_costs_nothing() -> None:
    advice = recommend(JOB, machine(1e9), GAPS.carried_over(1024), 10.0)
    assert (advice.measured, advice.plan, advice.command_line) == (None, None, "")
    # The budget excludes all that was measured, those with a gain too.
    assert recommend(JOB, machine(10), GAPS.carried_over(1024), -5.0).measured is None


def test_boundaries_of_one_link_go_together() -> None:
    """Seven boundaries over four links: the first and the fifth share the slow one."""
    slow = machine(100, 1e7, 1e7, 1e7, job=VIRTUAL)
    advice = recommend(VIRTUAL, slow, GAPS.carried_over(1024), 1.0)
    assert advice.plan is not None
    ranks = advice.plan.ranks
    assert [bool(rank) for rank in ranks] == [
        *[True, False, False, False], *[True, False, False]
    ]  # fmt: skip
    assert ranks[0] == ranks[4]


def test_a_faster_link_gets_a_setting_that_loses_less() -> None:
    """mapl-16x (2.82%) where bytes count, mapl-2x (−0.95%) where they do not."""
    settings = GAPS.carried_over(1024)
    one = machine(500, 1000, 5000)
    advice = recommend(JOB, one, settings, 3.0)
    names = [setting and setting.name for setting in advice.boundaries]
    assert names == ["mapl-16x", "mapl-16x", "mapl-2x"]
    assert advice.plan is not None and advice.measured is not None
    assert advice.plan.ranks == (160, 160, 960)
    assert advice.plan.forward_codecs == ("int8", "int8", "int8")
    assert advice.plan.backward_codecs == ("int4", "int4", "int8")
    assert "--mapl-rank 160 160 960 " in advice.command_line
    assert "--mapl-backward-codec int4 int4 int8" in advice.command_line
    # No better than the worst of its settings.
    assert advice.measured.name == "mapl-16x" and f"{advice.measured.gap:.2f}" == "2.82"
    assert advice.prediction.setting.gap == advice.measured.gap
    fastest = min(predict(JOB, s, one).seconds for s in settings if s.gap and s.gap <= 3)
    assert advice.prediction.seconds <= fastest * (1 + TOLERANCE)


def test_a_boundary_may_cost_a_little_of_the_chosen_settings_time() -> None:
    """Chosen is mapl-8x, some 1% slower than mapl-8x-fixed, for its smaller gap."""
    job = dataclasses.replace(JOB, global_batch_size=64)
    links = machine(10_000, 500, 10_000, job=job)
    settings = {setting.name: setting for setting in GAPS.carried_over(1024)}
    advice = recommend(job, links, list(settings.values()), 1.0)
    names = [setting and setting.name for setting in advice.boundaries]
    assert names == [None, "mapl-8x", "mapl-8x"]
    chosen, fastest = (
        predict(job, settings[name], links).seconds for name in ("mapl-8x", "mapl-8x-fixed")
    )
    assert fastest < chosen < fastest * (1 + TOLERANCE) < advice.prediction.seconds
    assert advice.prediction.seconds <= chosen * (1 + TOLERANCE)


@pytest.mark.parametrize("budget", [0.5, 1.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("mbit", [(100, 3000, 10000), (50, 200, 1000), (100, 1000, 100)])
def test_settings_of_boundaries_fit_each_other(mbit: tuple[float, ...], budget: float) -> None:
    """Within the budget, with one anchor and projector, and one rank at least as large each."""
    advice = recommend(JOB, machine(*mbit), GAPS.carried_over(1024), budget)
    assert advice.plan is not None and advice.measured is not None
    assert advice.measured.gap is not None
    for number, setting in enumerate(advice.boundaries):
        if setting is None:
            assert advice.plan.ranks[number] == 0
            continue
        assert setting.gap is not None and setting.gap <= advice.measured.gap <= budget
        assert advice.plan.ranks[number] == setting.flags["rank"][0]
        config, other = setting.config, advice.measured.config
        assert config is not None and other is not None
        assert (config.anchor, config.anchor_rank, config.projector) == (
            other.anchor, other.anchor_rank, other.projector
        )  # fmt: skip


def test_two_processes_have_one_link_for_all_boundaries() -> None:
    """Boundaries 0 and 2 are a pipeline apart, boundary 1 goes the other way round."""
    job = dataclasses.replace(VIRTUAL, pipeline_model_parallel_size=2)
    advice = recommend(job, machine(100, job=job), GAPS.carried_over(1024), 3.0)
    assert advice.plan is not None
    assert advice.plan.ranks[0] == advice.plan.ranks[2] > 0
    assert advice.boundaries[0] == advice.boundaries[2]
