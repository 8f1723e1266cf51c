"""Runs that several modules compare with."""

import pytest

from training.distill import launch as distill
from training.distill import plots

from .runs import DISTILL, RDPO, STAGES, RunFolder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Plots take longer than these runs; whole_distill has its own."""
    monkeypatch.setattr(distill, "draw", lambda run, trainer, curves: None)


@pytest.fixture(params=STAGES)
def stage(request):
    """Each training stage."""
    return request.param


@pytest.fixture(scope="session")
def whole_distill(tmp_path_factory) -> RunFolder:
    """A run of the small distillation that nothing stopped; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "draw", plots.draw)
        return DISTILL.start(tmp_path_factory.mktemp("distill"), "whole")


@pytest.fixture(scope="session")
def whole_rdpo(tmp_path_factory) -> RunFolder:
    """The same of RDPO."""
    return RDPO.start(tmp_path_factory.mktemp("rdpo"), "whole")


@pytest.fixture
def whole(request, stage) -> RunFolder:
    """The uninterrupted run of a stage."""
    return request.getfixturevalue("whole_distill" if stage is DISTILL else "whole_rdpo")
