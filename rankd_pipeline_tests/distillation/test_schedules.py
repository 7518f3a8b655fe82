"""AL-PL on scripted validation losses: when it turns, why, and that it needs nothing but the losses."""

from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.distillation.schedules import ScheduleConfig, turns


def phases(losses, epochs=20, **settings) -> str:
    """One letter an epoch, A or P, for all epochs that `losses` decide."""
    return "".join(turn.phase[0] for turn in turns(losses, epochs, ScheduleConfig(**settings)))


def test_never_always_and_periodic():
    assert phases([1.0] * 9, mode="never") == "A" * 10
    assert phases([1.0] * 9, mode="always") == "P" * 10
    assert phases([0.5**i for i in range(11)], mode="periodic", most_autonomous=3, passive=2, warmup=0, epochs=12) == "AAAPPAAAPPAA"


def test_progress_keeps_the_student_by_itself_until_the_limit():
    improving = [0.8**i for i in range(12)]
    assert phases(improving, most_autonomous=8, passive=2) == "A" * 8 + "PP" + "AAA"


def test_two_stalled_epochs_call_the_teacher_and_the_reason_is_told():
    losses = [1.0, 0.5, 0.499, 0.498, 0.3, 0.2]
    found = turns(losses, 20, ScheduleConfig())
    assert [turn.phase for turn in found] == ["AL", "AL", "AL", "AL", "PL", "PL", "AL"]
    assert found[4].reason == "less than 1% better for 2 validations"
    assert [turn.passive_phase for turn in found] == [0, 0, 0, 0, 1, 1, 1]


def test_slow_but_steady_gains_of_less_than_the_stall_still_count_from_the_best():
    # Each epoch 0.6 % better than the best: never one whole per cent at once.
    assert "P" in phases([0.994**i for i in range(4)])


def test_never_before_the_least_autonomous_epochs_and_never_in_the_warm_up():
    flat = [1.0] * 12
    assert phases(flat, least_autonomous=5, stall_epochs=1)[:5] == "AAAAA"
    assert phases(flat, mode="periodic", most_autonomous=1, passive=1, warmup=4)[:4] == "AAAA"


def test_the_last_tenth_is_autonomous():
    assert phases([1.0] * 19, epochs=20, mode="periodic", most_autonomous=1, passive=30, warmup=0)[-2:] == "AA"


def test_an_epoch_without_validation_says_nothing():
    assert phases([1.0, 0.5, None, None, None, 0.1]) == "AAAAAAA"


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=30), st.sampled_from(["plateau", "periodic", "always", "never"]))
def test_a_phase_depends_on_the_past_alone(losses, mode):
    cfg = ScheduleConfig(mode=mode)
    whole = turns(losses, 40, cfg)
    for cut in range(len(losses) + 1):
        assert turns(losses[:cut], 40, cfg) == whole[: cut + 1]
