"""EPD: its equations, its batching and its tables per image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Conditioned, Recorded, noise, nonlinear, random_table

from solvers import EPD, SolverTable, polynomial, sample

ADAMS_BASHFORTH = {
    1: [1.0],
    2: [1.5, -0.5],
    3: [23 / 12, -4 / 3, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -3 / 8],
}


def nodes(num_intervals):
    return polynomial(num_intervals + 1, 0.05, 8.0)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def image_table(table, b):
    """The table of image b of a table [B, N, K]."""
    return SolverTable(**{name: value[b] for name, value in table.arrays().items()})


def written_out(table, max_order, velocity, x, sigmas):
    """The method's equations with a loop over the points, for one table."""
    velocities: list = []
    for n in range(len(sigmas) - 1):
        s, s_next = sigmas[n].item(), sigmas[n + 1].item()
        velocities = [velocity(x, torch.tensor(s, dtype=torch.float64)), *velocities]
        order = min(max_order, n + 1)
        d = sum(a * velocities[i] for i, a in enumerate(ADAMS_BASHFORTH[order]))
        total = torch.zeros_like(x)
        for k in range(table.num_points):
            r, w = table.r[n, k].item(), table.w[n, k].item()
            o, a = (
                (1.0, 1.0)
                if table.scale_dir is None
                else (table.scale_dir[n, k].item(), table.scale_time[n, k].item())
            )
            s_k = s_next**r * s ** (1 - r)
            total = total + w * o * a * velocity(
                x + (s_k - s) * d, torch.tensor(a * s_k, dtype=torch.float64)
            )
        x = x + (s_next - s) * total
    return x


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_equations(max_order, scales):
    table, sigmas, x = random_table(6, 3, scales=scales), nodes(6), 8 * noise(2, 5)
    assert_same(
        sample(EPD(table, max_order=max_order), nonlinear, x, sigmas),
        written_out(table, max_order, nonlinear, x, sigmas),
    )


@st.composite
def problems(draw):
    batch, intervals, points = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    leading = (batch,) if draw(st.booleans()) else ()
    table = random_table(
        *leading, intervals, points, seed=draw(st.integers(0, 1000)), scales=draw(st.booleans())
    )
    options = {"max_order": draw(st.integers(1, 4)), "afs": draw(st.booleans())}
    return table, options, 8 * noise(batch, 2, 3, seed=batch), Conditioned(noise(batch, seed=7))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 13))
def test_batching_does_not_change_the_result(problem, max_batch):
    table, options, x, field = problem
    sigmas, batch, points = nodes(table.num_intervals), len(x), table.num_points
    parallel, sequential, chunked = Recorded(field), Recorded(field), Recorded(field)
    expected = sample(EPD(table, **options), parallel, x, sigmas)
    assert_same(sample(EPD(table, **options, parallel=False), sequential, x, sigmas), expected)
    assert_same(sample(EPD(table, **options, max_batch=max_batch), chunked, x, sigmas), expected)

    first = [] if options["afs"] else [batch]
    later = table.num_intervals - 1
    assert parallel.rows == first + [points * batch] + [batch, points * batch] * later
    assert sequential.rows == first + [batch] * points + [batch] * (1 + points) * later
    assert sum(chunked.rows) == sum(parallel.rows)
    assert max(chunked.rows) <= max(batch, max_batch)
    assert all(rows % batch == 0 for rows in chunked.rows)


@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans())
def test_an_image_does_not_depend_on_its_batch(problem, parallel):
    """Nor on the tables of the others: row b of a batch is image b alone with its own condition and table."""
    table, options, x, field = problem
    sigmas = nodes(table.num_intervals)
    together = sample(EPD(table, **options, parallel=parallel), field, x, sigmas)
    for b in range(len(x)):
        own = image_table(table, b) if table.r.ndim == 3 else table
        alone = sample(EPD(own, **options), Conditioned(field.conditions[b : b + 1]), x[b : b + 1], sigmas)
        assert_same(together[b : b + 1], alone)


@settings(max_examples=30, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(problem, random):
    table, options, x, field = problem
    order = random.sample(range(table.num_points), table.num_points)
    shuffled = SolverTable(**{name: value[..., order] for name, value in table.arrays().items()})
    sigmas = nodes(table.num_intervals)
    assert_same(
        sample(EPD(shuffled, **options), field, x, sigmas), sample(EPD(table, **options), field, x, sigmas)
    )


def test_noise_levels_of_a_call():
    """One for the gradient at the node; one a row for the points, point-major, in float64."""
    table = random_table(2, 1, 3, scales=True)
    field, sigmas = Recorded(), nodes(1)
    sample(EPD(table), field, 8 * noise(2, 4), sigmas)
    first, points = field.sigmas
    assert first.shape == ()
    assert first == sigmas[0]
    levels = table.scale_time[:, 0] * sigmas[1] ** table.r[:, 0] * sigmas[0] ** (1 - table.r[:, 0])
    assert points.dtype == torch.float64
    assert_same(points, levels.T.reshape(-1))


def test_the_state_keeps_its_type():
    x = 8 * noise(2, 3, 4, 4)
    for table in (random_table(3, 2), random_table(2, 3, 2)):
        single = sample(EPD(table), nonlinear, x.float(), nodes(3))
        assert single.dtype == torch.float32
        torch.testing.assert_close(
            single.double(), sample(EPD(table), nonlinear, x, nodes(3)), rtol=1e-4, atol=1e-4
        )


def test_errors():
    x = noise(2, 4)
    with pytest.raises(ValueError, match="4 nodes, but the table is for 3"):
        sample(EPD(random_table(2, 2)), nonlinear, x, nodes(3))
    with pytest.raises(ValueError, match="last node is 0"):
        sample(EPD(random_table(2, 2)), nonlinear, x, torch.tensor([2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"\[3\] images, but there are 2"):
        sample(EPD(random_table(3, 2, 2)), nonlinear, x, nodes(2))
    with pytest.raises(ValueError, match=r"\[1\] images, but there are 2"):
        sample(EPD(random_table(1, 2, 2)), nonlinear, x, nodes(2))
    with pytest.raises(ValueError, match="max_batch is 0"):
        EPD(random_table(2, 2), max_batch=0)
    for order in (0, 5):
        with pytest.raises(ValueError, match=f"order {order}, expected 1 to 4"):
            EPD(random_table(2, 2), max_order=order)
