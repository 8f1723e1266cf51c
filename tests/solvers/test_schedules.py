"""Schedules against published nodes, and the noise schedule's interpolation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NoiseSchedule, discrete, flowmatch, logsnr, polynomial, time_uniform

SD15 = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
SCHEDULE = NoiseSchedule(SD15)

PUBLISHED = {
    "polynomial": (lambda: polynomial(4, 0.002, 80.0), "80 9.723201 0.469979 0.002"),
    "logsnr": (lambda: logsnr(4, 0.002, 80.0), "80 2.339214 0.068399 0.002"),
    "time_uniform": (lambda: time_uniform(4, 0.002, 80.0), "80 6.9502354 1.2866689 0.002"),
    "discrete": (
        lambda: discrete(11, SCHEDULE),
        "14.614641 8.307172 5.092408 3.325070 2.279731 1.615581 1.162866 0.831885 0.571190 0.343706 0.029168",
    ),
    "flowmatch shift": (
        lambda: flowmatch(11, shift=3),
        "1 .9644002 .9233425 .8754675 .8189234 .7511211 .6683267 .5649496 .4322251 .2555887 .0089286",
    ),
    "flowmatch mu": (
        lambda: flowmatch(9, mu=1.15),
        "1 .9567710 .9046459 .8405634 .7598760 .6551693 .5138424 .3126124 .0031514",
    ),
}


@pytest.mark.parametrize(("make", "nodes"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_nodes(make, nodes):
    expected = torch.tensor([float(node) for node in nodes.split()], dtype=torch.float64)
    torch.testing.assert_close(make(), expected, rtol=0, atol=1e-6)


def test_published_time_uniform_nodes():
    """They were computed in float32, where log(1 + sigma_min^2) loses its digits: hence the tolerance."""
    expected = torch.tensor([80.0, 6.950277, 1.286681, 0.002], dtype=torch.float64)
    torch.testing.assert_close(time_uniform(4, 0.002, 80.0), expected, rtol=1e-5, atol=0)


ENDS = st.tuples(st.floats(1e-3, 0.03), st.floats(2, 200))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), ENDS, st.floats(1, 12))
def test_nodes_descend_between_exact_ends(num_steps, ends, rho):
    for schedule in (polynomial, logsnr, time_uniform):
        nodes = schedule(num_steps, *ends) if schedule is logsnr else schedule(num_steps, *ends, rho)
        assert nodes.dtype == torch.float64
        assert nodes.shape == (num_steps,)
        assert (nodes[-1].item(), nodes[0].item()) == ends
        assert (nodes.diff() < 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.floats(0.2, 12), st.floats(-1, 3))
def test_flow_and_discrete_nodes_descend_from_an_exact_start(num_steps, shift, mu):
    for nodes in (
        flowmatch(num_steps, shift=shift),
        flowmatch(num_steps, mu=mu),
        discrete(num_steps, SCHEDULE),
    ):
        assert nodes.dtype == torch.float64
        assert nodes.shape == (num_steps,)
        assert (nodes.diff() < 0).all()
        assert nodes[-1] > 0
    assert flowmatch(num_steps, shift=shift)[0] == 1
    assert flowmatch(num_steps, mu=mu)[0] == 1
    assert discrete(num_steps, SCHEDULE)[0] == SCHEDULE.sigma_max
    assert discrete(num_steps, SCHEDULE)[-1] == pytest.approx(SCHEDULE.sigma_min, rel=1e-12)


def test_what_each_schedule_is_uniform_in():
    """sigma^(1/rho); log sigma; the root of the time of the VP process; the time of the noise schedule."""
    quantities = [
        polynomial(9, 0.01, 40.0, rho=3) ** (1 / 3),
        logsnr(9, 0.01, 40.0).log(),
        SCHEDULE.t(discrete(9, SCHEDULE)),
    ]
    for quantity in quantities:
        steps = quantity.diff()
        torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-9, atol=1e-12)
    # the VP process has log(1 + sigma^2) = a t^2 + b t: linear in t after division by t = (1 + u (sqrt(0.001)
    # - 1))^2
    t = (1 + torch.arange(9, dtype=torch.float64) / 8 * (0.001**0.5 - 1)) ** 2
    ratio = torch.log1p(time_uniform(9, 0.01, 40.0, rho=2) ** 2) / t
    torch.testing.assert_close(
        ratio.diff() / t.diff(), (ratio.diff() / t.diff())[:1].expand(8), rtol=1e-9, atol=0
    )


def test_flowmatch_without_a_shift_is_uniform():
    expected = torch.linspace(1, 0.001, 7, dtype=torch.float64)
    torch.testing.assert_close(flowmatch(7, shift=1), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(flowmatch(7, mu=0.0), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", [polynomial, logsnr, time_uniform])
def test_bad_ends_and_counts(make):
    with pytest.raises(ValueError, match="1 nodes, expected at least 2"):
        make(1, 0.1, 1.0)
    for low, high in ((0.0, 1.0), (-0.5, 1.0), (1.0, 0.25), (0.75, 0.75)):
        with pytest.raises(ValueError, match=f"sigma_min {low} and sigma_max {high}"):
            make(3, low, high)
    with pytest.raises(ValueError, match="sigma_min nan"):
        make(3, math.nan, 1.0)


def test_bad_flowmatch_and_discrete():
    with pytest.raises(ValueError, match="either shift or mu"):
        flowmatch(5)
    with pytest.raises(ValueError, match="either shift or mu"):
        flowmatch(5, shift=3.0, mu=1.0)
    for make in (
        lambda: flowmatch(1, shift=3.0),
        lambda: flowmatch(1, mu=1.0),
        lambda: discrete(1, SCHEDULE),
    ):
        with pytest.raises(ValueError, match="1 nodes, expected at least 2"):
            make()


def test_noise_schedule_at_its_knots():
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    sigma = ((1 - SD15) / SD15).sqrt()
    torch.testing.assert_close(SCHEDULE.sigma(times), sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(SCHEDULE.t(sigma), times, rtol=1e-12, atol=0)
    assert SCHEDULE.sigma_min == pytest.approx(sigma[0].item(), rel=1e-12)
    assert SCHEDULE.sigma_max == pytest.approx(sigma[-1].item(), rel=1e-12)


def test_noise_schedule_between_and_beyond_its_knots():
    """log alpha is linear between two knots, and the first and last piece go on."""
    log_alpha = torch.tensor([-0.1, -0.3, -0.9], dtype=torch.float64)
    schedule = NoiseSchedule((2 * log_alpha).exp())
    times = torch.tensor([[1 / 6, 0.5], [5 / 6, 4 / 3]], dtype=torch.float64)
    expected = torch.tensor([[0.0, -0.2], [-0.6, -1.5]], dtype=torch.float64)
    sigma = ((1 - (2 * expected).exp()) / (2 * expected).exp()).sqrt()
    torch.testing.assert_close(
        schedule.sigma(times), sigma, rtol=1e-12, atol=2e-8
    )  # the root of a rounding error at sigma 0
    torch.testing.assert_close(schedule.t(sigma), times, rtol=1e-12, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.0009, 1.5), min_size=1, max_size=5))
def test_noise_schedule_round_trip(times):
    t = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULE.t(SCHEDULE.sigma(t)), t, rtol=1e-9, atol=0)


def test_noise_schedule_takes_any_shape_and_returns_float64():
    sigma = torch.tensor([[0.5, 3.0, 0.1]])
    assert SCHEDULE.t(sigma).dtype == torch.float64
    assert SCHEDULE.t(sigma).shape == (1, 3)
    assert SCHEDULE.t(sigma[0, 1]).shape == ()
    assert torch.equal(SCHEDULE.t(sigma.T), SCHEDULE.t(sigma).T)


@pytest.mark.parametrize("sigma", [0.02, 0.4, 5.0, 20.0])
def test_gradient_of_the_time(sigma):
    """Time is differentiable in the noise level (inside a segment and beyond the ends)."""
    sigma = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SCHEDULE.t, sigma, eps=1e-7)
    assert torch.autograd.grad(SCHEDULE.t(sigma), sigma)[0] > 1e-4


def test_bad_noise_schedules():
    for values in ([0.5], [0.5, 0.9], [0.9, 0.9], [1.0, 0.5], [0.9, 0.0], [[0.9, 0.5]]):
        with pytest.raises(ValueError, match="fall strictly within"):
            NoiseSchedule(torch.tensor(values))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: time_uniform(3, 0.25, 1.0), "descend"),
        (lambda: flowmatch(4, shift=0.0), r"shift 0\.0"),
        (lambda: flowmatch(4, shift=-1.0), r"shift -1\.0"),
        (lambda: flowmatch(4, mu=800.0), r"mu 800\.0"),
        (lambda: polynomial(4, 0.1, float("inf")), "inf"),
        (lambda: polynomial(4, 0.1, 1.0, rho=0), "rho is 0"),
        (lambda: NoiseSchedule(torch.tensor([0.9, float("nan"), 0.1])), "alphas_cumprod"),
    ],
)
def test_nodes_that_would_be_nonsense_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
