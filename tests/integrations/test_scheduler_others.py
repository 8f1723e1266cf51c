"""Further pipelines of diffusers: an Euler table is the stock scheduler, a learned one our solver."""

import pytest
import torch
from cases import OTHERS
from reference import CLOSE, own_latents, random_table, stock_table, velocity_of

from integrations.diffusers import EPDScheduler
from solvers import load_predictor

STEPS = 3


@pytest.fixture(scope="module", params=OTHERS)
def case(request):
    torch.manual_seed(0)
    return OTHERS[request.param]()


@pytest.fixture(scope="module")
def stock(case):
    """The stock scheduler after its own run, and the latents of that."""
    scheduler = case.pipe.scheduler
    return scheduler, case.latents(scheduler, STEPS, case.noise())


def test_an_euler_table_is_the_stock_scheduler(case, stock, tmp_path):
    scheduler, expected = stock
    table = stock_table(scheduler.sigmas, tmp_path)
    actual = case.latents(EPDScheduler.from_predictor(table, config=scheduler.config), STEPS, case.noise())
    size = expected.abs().max()
    assert torch.allclose(actual, expected, rtol=0, atol=CLOSE * max(1.0, size))
    assert (expected - case.noise() * scheduler.sigmas[0]).abs().max() > 0.05  # the network has an effect


def test_a_learned_table_is_the_projects_own_solver(case, stock, tmp_path):
    scheduler, _ = stock
    nodes = torch.as_tensor(scheduler.sigmas[:-1], dtype=torch.float64)
    path = random_table("epd", nodes, tmp_path, None)
    drop_in = EPDScheduler.from_predictor(path, config=scheduler.config)
    actual = case.latents(drop_in, 3 * (len(nodes) - 1), case.noise())
    expected = own_latents(load_predictor(path), velocity_of(case, scheduler.config), case.noise())
    assert torch.allclose(actual, expected, rtol=0, atol=CLOSE * max(1.0, expected.abs().max()))
