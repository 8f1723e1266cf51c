"""Autograd through the velocity of a frozen network."""

import pytest
import torch
from tiny import PROMPTS, load_tiny, states


@pytest.fixture(scope="module")
def double(tiny_folder):
    return load_tiny(tiny_folder, torch.float64)


def energy(backend, guidance):
    """A scalar of x and sigma: the velocity against a fixed direction."""
    velocity = backend.velocity(backend.encode(PROMPTS[:2], guidance))
    along = states(2, seed=7).double()
    return lambda x, sigma: (velocity(x, sigma).double() * along).sum()


@pytest.mark.parametrize("guidance", [1, 4.0])
def test_gradient_in_x(double, guidance):
    f, x, sigma = energy(double, guidance), states(2).double(), torch.tensor(2.0, dtype=torch.float64)
    direction = states(2, seed=8).double()
    h = 1e-3
    measured = (f(x + h * direction, sigma) - f(x - h * direction, sigma)) / (2 * h)
    (gradient,) = torch.autograd.grad(f(x.requires_grad_(), sigma), x)
    assert (gradient * direction).sum().item() == pytest.approx(measured.item(), rel=5e-3)
    assert measured.abs() > 1


@pytest.mark.parametrize("guidance", [1, 4.0])
def test_gradient_in_sigma(double, guidance):
    """Through the scale of the input and through the time; one noise level an image."""
    f, x = energy(double, guidance), states(2).double()
    sigma = torch.tensor([1.3, 2.6], dtype=torch.float64)
    gradient = torch.autograd.grad(f(x, sigma.requires_grad_()), sigma)[0]
    for i in range(2):
        h = 1e-4 * torch.eye(2, dtype=torch.float64)[i]
        measured = (f(x, sigma + h) - f(x, sigma - h)) / 2e-4
        assert gradient[i].item() == pytest.approx(measured.item(), rel=0.03, abs=0.3)
        assert measured.abs() > 3


def test_weights_get_no_gradient(digits):
    x, sigma = states(2).requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    velocity = digits.velocity(digits.encode(["a red three", "a thin five"], 7.5))
    velocity(x, sigma).square().mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert sigma.grad.isfinite()
    assert sigma.grad != 0
    assert all(p.grad is None for m in (digits.pipe.unet, digits.pipe.text_encoder) for p in m.parameters())


def test_gradients_in_single_precision_are_those_in_double(double, tiny):
    sigma, gradients = torch.tensor(2.0, dtype=torch.float64), []
    for backend, dtype in ((double, torch.float64), (tiny, torch.float32)):
        x = states(2).to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(energy(backend, 4.0)(x, sigma), x)[0])
    torch.testing.assert_close(
        gradients[1].double(), gradients[0], rtol=0, atol=1e-3 * gradients[0].abs().max().item()
    )


def test_gradient_after_encoding_in_inference_mode(tiny_folder):
    """A condition made while sampling serves training as well."""
    backend = load_tiny(tiny_folder)
    with torch.inference_mode():
        backend.encode(PROMPTS[:2], 4.0)
    condition = backend.encode(PROMPTS[:1], 4.0)
    assert not condition.positive["text"].is_inference()
    assert not condition.negative["text"].is_inference()
    x = states(2).requires_grad_()
    energy(backend, 4.0)(x, torch.tensor(2.0)).backward()
    assert x.grad.abs().max() > 0
