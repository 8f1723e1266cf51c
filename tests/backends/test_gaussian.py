"""The Gaussian mixture, whose scores and samples are known, and the nodes that a backend makes of a spec."""

import math
from dataclasses import replace

import pytest
import torch

from backends import SCHEDULES, Backend, BackendError
from backends.gaussian import COMPONENTS, STD
from solvers import Heun, Spec, discrete, flowmatch, logsnr, polynomial, sample, time_uniform

PROMPTS = ["zero", "one", "two", "three", "four"]


def states(n, seed=3):
    return 2 * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_density(gaussian, x, sigma, weights):
    """log sum_k w_k N(x; mean_k, (STD^2 + sigma^2) I) of each row, up to a constant."""
    variance = STD**2 + sigma**2
    parts = [
        torch.distributions.MultivariateNormal(
            mean.flatten(), variance.item() * torch.eye(256, dtype=torch.float64)
        ).log_prob(x.flatten(1))
        for mean in gaussian.means
    ]
    return torch.logsumexp(torch.stack(parts, -1) + weights.log(), -1)


def score(gaussian, x, sigma, weights):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(gaussian, x, sigma, weights).sum(), x)[0]


@pytest.mark.parametrize("sigma", [0.03, 0.7, 4.0, 30.0])
def test_velocity_is_minus_sigma_times_the_score(gaussian, sigma):
    sigma, x = torch.tensor(sigma, dtype=torch.float64), states(5)
    condition = gaussian.encode(PROMPTS, 1)
    ours = gaussian.velocity(condition)(x, sigma)
    expected = -sigma * score(gaussian, x, sigma, condition.positive["logits"].softmax(-1))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_prompt_makes_one_component_likely(gaussian):
    weights = gaussian.encode(PROMPTS, 1).positive["logits"].softmax(-1)
    odds = weights / weights.min(-1, keepdim=True).values
    assert odds.sort().values[0].tolist() == pytest.approx([1, 1, 1, math.exp(3)])
    assert len({row.argmax().item() for row in weights}) > 1
    assert torch.equal(weights[1:2], gaussian.encode(["one"], 1).positive["logits"].softmax(-1))


def test_guidance(gaussian):
    """u + s (c - u), where u is the mixture of equal weights."""
    sigma, x = torch.tensor(8.0, dtype=torch.float64), states(5)
    condition = gaussian.encode(PROMPTS, 3.0)
    c = -sigma * score(gaussian, x, sigma, condition.positive["logits"].softmax(-1))
    u = -sigma * score(gaussian, x, sigma, torch.full((5, COMPONENTS), 1 / COMPONENTS, dtype=torch.float64))
    ours = gaussian.velocity(condition)(x, sigma).double()
    torch.testing.assert_close(ours, u + 3 * (c - u), rtol=1e-6, atol=1e-6)
    assert (c - u).abs().max() > 0.01


@pytest.mark.parametrize("guidance", [1, 3.0])
def test_rows_are_point_major_and_have_their_own_sigma(gaussian, guidance):
    x, sigmas = states(4), torch.tensor([0.5, 2.0, 6.0, 12.0], dtype=torch.float64)
    together = gaussian.velocity(gaussian.encode(["zero", "two"], guidance))(x, sigmas)
    for row in range(4):
        alone = gaussian.velocity(gaussian.encode([("zero", "two")[row % 2]], guidance))(
            x[row : row + 1], sigmas[row]
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


def test_gradients(gaussian):
    """Exact to the float32 in which a velocity is returned."""
    velocity = gaussian.velocity(gaussian.encode(["zero"], 3.0))
    x, sigma, h = states(1), torch.tensor(5.0, dtype=torch.float64, requires_grad=True), 1e-2
    along = states(1, seed=4)
    (velocity(x, sigma) * along).sum().backward()
    measured = ((velocity(x, sigma.detach() + h) - velocity(x, sigma.detach() - h)) * along).sum() / (2 * h)
    assert sigma.grad.item() == pytest.approx(measured.item(), rel=1e-3)


def test_samples_have_the_moments_of_the_mixture(gaussian):
    n, nodes = 2000, polynomial(60, 0.02, 4000.0)  # so high that the start is noise alone
    condition = gaussian.encode(["three"] * n, 1)
    x = sample(
        Heun(), gaussian.velocity(condition), gaussian.initial_latents(range(n), nodes[0]), nodes
    ).double()
    gaps = x.flatten(1)[:, None] - gaussian.means.flatten(1)
    nearest = gaps.square().sum(-1).argmin(-1)
    weights = condition.positive["logits"][0].softmax(-1)
    for k in range(COMPONENTS):
        share = (nearest == k).double().mean().item()
        assert share == pytest.approx(
            weights[k].item(), abs=4 * (weights[k] * (1 - weights[k]) / n).sqrt().item()
        )
        offsets = gaps[nearest == k, k]
        std = math.hypot(STD, 0.02)
        assert offsets.mean(0).abs().max().item() < 5 * std / len(offsets) ** 0.5
        assert offsets.std(correction=0).item() == pytest.approx(std, rel=0.02)


def test_decode(gaussian):
    images = gaussian.decode(states(3))
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, gaussian.decode(states(3).float()))


def test_noise_levels_are_those_of_stable_diffusion(gaussian, tiny):
    assert gaussian.sigma_min == pytest.approx(tiny.sigma_min, rel=1e-4)
    assert gaussian.sigma_max == pytest.approx(tiny.sigma_max, rel=1e-4)


def nodes_of(kind, backend: Backend):
    """The schedule functions called by hand, between the backend's own noise levels."""
    ends = backend.sigma_min, backend.sigma_max
    return {
        "polynomial": lambda: polynomial(7, *ends),
        "logsnr": lambda: logsnr(7, *ends),
        "time_uniform": lambda: time_uniform(7, *ends),
        "discrete": lambda: discrete(7, backend.noise_schedule),
    }[kind]()


@pytest.mark.parametrize("kind", [k for k in SCHEDULES if k != "flowmatch"])
def test_nodes_of_each_schedule(gaussian, tiny, kind):
    for backend in (gaussian, tiny):
        nodes = backend.sigmas(Spec(num_steps=7, schedule_type=kind))
        assert torch.equal(nodes, nodes_of(kind, backend))
        assert nodes.dtype == torch.float64
        assert nodes[0].item() == pytest.approx(backend.sigma_max, rel=1e-12)
        assert nodes[-1].item() == pytest.approx(backend.sigma_min, rel=1e-12)


def test_nodes_follow_the_spec(gaussian):
    spec = Spec(num_steps=5, schedule_type="polynomial", sigma_min=0.1, sigma_max=9.0, schedule_rho=3.0)
    assert torch.equal(gaussian.sigmas(spec), polynomial(5, 0.1, 9.0, 3.0))
    assert torch.equal(
        gaussian.sigmas(replace(spec, schedule_type="time_uniform")), time_uniform(5, 0.1, 9.0, 3.0)
    )
    assert torch.equal(gaussian.sigmas(replace(spec, schedule_type="logsnr")), logsnr(5, 0.1, 9.0))
    assert torch.equal(gaussian.sigmas(Spec(num_steps=6)), discrete(6, gaussian.noise_schedule))


def test_flow_matching_nodes(gaussian, monkeypatch):
    """They need a backbone with a shift or a mu; the spec's own come first."""
    spec = Spec(num_steps=5, schedule_type="flowmatch")
    monkeypatch.setattr(gaussian, "flow_shift", 3.0)
    assert torch.equal(gaussian.sigmas(spec), flowmatch(5, shift=3.0))
    assert torch.equal(gaussian.sigmas(replace(spec, flowmatch_shift=2.0)), flowmatch(5, shift=2.0))
    assert torch.equal(gaussian.sigmas(replace(spec, flowmatch_mu=0.8)), flowmatch(5, mu=0.8))
    monkeypatch.setattr(gaussian, "flow_mu", 1.15)
    assert torch.equal(gaussian.sigmas(spec), flowmatch(5, mu=1.15))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            Spec(num_steps=5, schedule_type="flowmatch"),
            "schedule 'flowmatch' does not fit backend 'gaussian'",
        ),
        (Spec(num_steps=5, schedule_type="cosine"), "schedule 'cosine'"),
        (Spec(), "num_steps is not set"),
    ],
)
def test_schedules_that_do_not_fit(gaussian, spec, words):
    with pytest.raises(BackendError, match=words) as caught:
        gaussian.sigmas(spec)
    assert "\n" not in str(caught.value)


def test_discrete_needs_a_noise_schedule(gaussian, monkeypatch):
    monkeypatch.setattr(gaussian, "noise_schedule", None)
    with pytest.raises(BackendError, match="schedule 'discrete' does not fit backend 'gaussian'"):
        gaussian.sigmas(Spec(num_steps=5))
