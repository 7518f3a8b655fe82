"""The suite's own promise: what the tests of one xdist group share is made once."""

import pytest


@pytest.mark.xdist_group("suite")
def test_the_scheduler_sees_groups(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 takes the group out of what pytest-xdist 3.8 schedules by (pytest-xdist issue 1386), without a word: every chain
    that a group shares is then made in both workers, which costs minutes."""
    assert request.node.nodeid.endswith("@suite") == request.config.getoption("loadgroup", default=False)
