"""The latent diffusion backbone: its velocity by hand, guidance, rows and conditions."""

import math

import pytest
import torch
from tiny import CPU, PROMPTS, calls_of, load_tiny, states

from backends import BackendError, load_backend
from digits import FOLDER
from solvers import Spec

SIGMA = torch.tensor(1.2345, dtype=torch.float64)  # between two knots of the noise schedule


@pytest.fixture(params=["tiny", "digits"])
def backend(request):
    return request.getfixturevalue(request.param)


def time_by_hand(backend, sigma: float) -> torch.Tensor:
    """The timestep, counted from 0, whose log alpha belongs to sigma: linear between training timesteps."""
    knots = backend.pipe.scheduler.alphas_cumprod.double().log() / 2
    wanted = -0.5 * math.log1p(sigma**2)
    i = int((knots > wanted).sum()) - 1  # knots[i] > wanted >= knots[i + 1]
    return (i + (knots[i] - wanted) / (knots[i] - knots[i + 1])).float()


def eps_by_hand(backend, x, sigma, text):
    """The network's noise estimate at the variance-preserving state, one row at a time."""
    inputs = x / (1 + float(sigma) ** 2) ** 0.5
    t = time_by_hand(backend, float(sigma))
    rows = [
        backend.pipe.unet(inputs[i : i + 1], t, encoder_hidden_states=text[i : i + 1]).sample
        for i in range(len(x))
    ]
    return torch.cat(rows)


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_loaded_frozen_and_described(backend):
    modules = (backend.pipe.unet, backend.pipe.vae, backend.pipe.text_encoder)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(part.training for m in modules for part in m.modules())
    assert {p.dtype for m in modules for p in m.parameters()} == {torch.float32}
    assert backend.dtype == torch.float32
    assert backend.latent_shape == (4, 8, 8)
    assert backend.sigma_min == pytest.approx(0.02916, abs=1e-5)
    assert backend.sigma_max == pytest.approx(14.6146, abs=1e-4)


def test_identity(digits, tiny, tiny_folder):
    assert digits.identity() == "embedded"
    assert tiny.identity() == str(tiny_folder)
    assert load_tiny(tiny_folder, revision="main").identity() == f"{tiny_folder}@main"


def test_the_digits_folder_is_also_an_ldm_folder(digits):
    same = load_tiny(FOLDER)
    x, prompts = states(2), ["a bold red handwritten three", "7"]
    assert torch.equal(
        same.velocity(same.encode(prompts, 3.0))(x, SIGMA),
        digits.velocity(digits.encode(prompts, 3.0))(x, SIGMA),
    )
    assert (same.name, digits.name) == ("ldm", "digits")


def test_velocity_is_the_networks_eps_at_the_continuous_time(backend):
    condition, x = backend.encode(PROMPTS, 1), states(3)
    assert time_by_hand(backend, SIGMA.item()) % 1 > 0.05
    with torch.no_grad(), calls_of(backend.pipe.unet) as calls:
        ours = backend.velocity(condition)(x, SIGMA)
    (inputs, t), _ = calls[0]
    assert t.dtype == torch.float32
    assert torch.equal(t, time_by_hand(backend, SIGMA.item()).expand(3))
    close(inputs, x / (1 + SIGMA.item() ** 2) ** 0.5, 1e-6)
    assert ours.dtype == torch.float32
    with torch.no_grad():
        close(ours, eps_by_hand(backend, x, SIGMA, condition.positive["text"]))


def test_guidance_is_one_doubled_batch(backend):
    condition, empty, x = backend.encode(PROMPTS, 7.5), backend.encode([""] * 3, 1), states(3)
    with torch.no_grad(), calls_of(backend.pipe.unet) as calls:
        ours = backend.velocity(condition)(x, SIGMA)
    assert len(calls) == 1
    (inputs, _), options = calls[0]
    assert torch.equal(inputs[:3], inputs[3:])
    text = options["encoder_hidden_states"]
    assert torch.equal(text, torch.cat([empty.positive["text"], condition.positive["text"]]))
    with torch.no_grad():
        u, c = (eps_by_hand(backend, x, SIGMA, part) for part in text.chunk(2))
        close(ours, u + 7.5 * (c - u), 2e-4)
    assert (c - u).abs().max() > 0.01


def test_no_guidance_is_a_single_batch(backend):
    condition = backend.encode(PROMPTS, 1)
    assert condition.negative is None
    with torch.no_grad(), calls_of(backend.pipe.unet) as calls:
        backend.velocity(condition)(states(3), SIGMA)
    assert [len(args[0]) for args, _ in calls] == [3]


def test_negative_prompt(tiny_folder, tiny):
    condition = load_tiny(tiny_folder, negative_prompt=PROMPTS[1]).encode(PROMPTS[:1], 2.0)
    assert torch.equal(condition.negative["text"], tiny.encode(PROMPTS[1:2], 1).positive["text"])


@pytest.mark.parametrize("guidance", [1, 7.5])
def test_rows_of_several_points_are_point_major(backend, guidance):
    """Row m * B + b has condition b."""
    x = states(6)
    with torch.no_grad():
        together = backend.velocity(backend.encode(PROMPTS, guidance))(x, SIGMA)
        for row in range(6):
            alone = backend.velocity(backend.encode([PROMPTS[row % 3]], guidance))(x[row : row + 1], SIGMA)
            close(together[row : row + 1], alone, 2e-4)


def test_one_sigma_a_row(backend):
    x, sigmas = states(3), torch.tensor([0.4, 3.0, 11.0], dtype=torch.float64)
    with torch.no_grad():
        together = backend.velocity(backend.encode(PROMPTS, 7.5))(x, sigmas)
        for row in range(3):
            alone = backend.velocity(backend.encode(PROMPTS[row : row + 1], 7.5))(
                x[row : row + 1], sigmas[row]
            )
            close(together[row : row + 1], alone, 2e-4)


def test_rows_that_do_not_fit_the_condition(tiny):
    with pytest.raises(ValueError, match="4 rows for a condition of 3 images"):
        tiny.velocity(tiny.encode(PROMPTS, 1))(states(4), SIGMA)


def test_conditions_are_repeated_once(tiny):
    velocity = tiny.velocity(tiny.encode(PROMPTS, 7.5))
    with torch.no_grad(), calls_of(tiny.pipe.unet) as calls:
        for rows in (6, 3, 6, 3):
            velocity(states(rows), SIGMA)
    six, three, again_six, again_three = (options["encoder_hidden_states"] for _, options in calls)
    assert six is again_six
    assert three is again_three
    assert (len(six), len(three)) == (12, 6)


def test_each_prompt_is_encoded_once(tiny_folder):
    backend = load_tiny(tiny_folder)
    with calls_of(backend.pipe.text_encoder) as calls:
        backend.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 1)
        assert len(calls) == 2
        backend.encode(PROMPTS[:2], 7.5)
        assert len(calls) == 3  # the empty prompt
        backend.encode(["", PROMPTS[1]], 4.0)
        assert len(calls) == 3


def test_an_embedding_does_not_depend_on_the_prompts_beside_it(tiny_folder):
    alone = load_tiny(tiny_folder).encode(PROMPTS[1:2], 1).positive["text"]
    beside = load_tiny(tiny_folder).encode(PROMPTS, 1).positive["text"]
    assert torch.equal(alone, beside[1:2])
    assert alone.shape == (1, 77, 32)


def test_the_cache_of_embeddings_is_bounded(tiny_folder, monkeypatch):
    backend = load_tiny(tiny_folder)
    monkeypatch.setattr(
        backend.pipe, "encode_prompt", lambda prompt, *_: (torch.full((1, 2, 3), float(prompt)), None)
    )
    backend._embeddings.limit = 100 * 2 * 3 * 4  # bytes of 100 embeddings in float32
    text = backend.encode([str(i) for i in range(150)], 1).positive["text"]
    assert text[:, 0, 0].tolist() == list(range(150))
    assert list(backend._embeddings.known) == [str(i) for i in range(50, 150)]


def test_encoded_prompts_can_enter_autograd(backend):
    condition = backend.encode(PROMPTS, 7.5)
    for text in (condition.positive["text"], condition.negative["text"]):
        assert not text.is_inference()
        assert not text.requires_grad


def test_v_prediction(tiny_folder, tmp_path):
    """eps = alpha v + sigma_vp x_vp, from x_vp = alpha x0 + sigma_vp eps and v = alpha eps - sigma_vp x0."""
    backend = with_prediction("v_prediction", tiny_folder, tmp_path)
    condition, x = backend.encode(PROMPTS, 1), states(3)
    alpha = 1 / (1 + SIGMA.item() ** 2) ** 0.5
    with torch.no_grad():
        v = eps_by_hand(backend, x, SIGMA, condition.positive["text"])
        eps = backend.velocity(condition)(x, SIGMA)
    close(eps, alpha * v + SIGMA.item() * alpha * (alpha * x))
    x0 = x - SIGMA.item() * eps
    close(alpha * eps - SIGMA.item() * alpha * x0, v, 5e-5)


def test_other_predictions_are_refused(tiny_folder, tmp_path):
    with pytest.raises(BackendError, match="prediction_type 'sample'"):
        with_prediction("sample", tiny_folder, tmp_path)


def with_prediction(kind, folder, tmp_path):
    """The tiny folder with another prediction_type in its scheduler's configuration."""
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    text = (folder / "scheduler" / "scheduler_config.json").read_text()
    assert '"prediction_type": "epsilon"' in text
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text.replace('"epsilon"', f'"{kind}"'))
    return load_tiny(tmp_path)


def test_decode(tiny):
    latents = states(5) / 3
    with torch.no_grad():
        images = tiny.decode(latents)
        raw = tiny.pipe.vae.decode(latents / 0.18215).sample
    assert images.shape == (5, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    close(images, (raw / 2 + 0.5).clamp(0, 1), 1e-6)
    assert tiny.decode(50 * latents).min() >= 0


def test_decode_in_chunks(digits):
    latents = states(5) / 3
    with torch.no_grad():
        close(digits.decode(latents, chunk=2), digits.decode(latents, chunk=5), 1e-5)
        assert digits.pipe.vae.config.scaling_factor != 0.18215
        raw = digits.pipe.vae.decode(latents / digits.pipe.vae.config.scaling_factor).sample
        close(digits.decode(latents), (raw / 2 + 0.5).clamp(0, 1), 1e-5)


def test_decoding_is_halved_where_memory_ends(digits, monkeypatch):
    latents, decode, sizes = digits.initial_latents(range(5), 1.0), digits.pipe.vae.decode, []
    with torch.inference_mode():
        whole = digits.decode(latents)

    def small(part):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(part)

    monkeypatch.setattr(digits.pipe.vae, "decode", small)
    with torch.inference_mode():
        torch.testing.assert_close(digits.decode(latents), whole, rtol=0, atol=1e-4)
    assert sizes == [5, 3, 2, 1, 2]


def test_an_image_that_cannot_be_decoded_ends_the_run(digits, monkeypatch):
    def full(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(digits.pipe.vae, "decode", full)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        digits.decode(digits.initial_latents([0, 1], 1.0))


def test_resolution(tiny_folder):
    backend = load_tiny(tiny_folder, resolution=96)
    assert backend.latent_shape == (4, 12, 12)
    x = backend.initial_latents([1], 1.0)
    with torch.no_grad():
        assert backend.velocity(backend.encode(["a cat"], 2.0))(x, SIGMA).shape == (1, 4, 12, 12)
        assert backend.decode(x).shape == (1, 3, 96, 96)


def test_bfloat16(tiny_folder, tiny):
    x = states(3)
    for backend in (load_tiny(tiny_folder, "bfloat16"), load_tiny(tiny_folder, torch_dtype="bf16")):
        assert backend.dtype == torch.bfloat16
        assert {p.dtype for p in backend.pipe.unet.parameters()} == {torch.bfloat16}
        with torch.no_grad(), calls_of(backend.pipe.unet) as calls:
            rough = backend.velocity(backend.encode(PROMPTS, 1))(x, SIGMA)
            exact = tiny.velocity(tiny.encode(PROMPTS, 1))(x, SIGMA)
        assert calls[0][0][1].dtype == torch.float32
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).abs().max() < 0.1
        assert backend.decode(x).dtype == torch.float32


def test_the_dtype_asked_for_comes_before_that_of_the_config(tiny_folder):
    assert load_tiny(tiny_folder, "float32", torch_dtype="bf16").dtype == torch.float32
    assert load_tiny(tiny_folder, "auto", torch_dtype="bf16").dtype == torch.bfloat16
    assert load_tiny(tiny_folder, "auto", torch_dtype="auto").dtype == torch.float32


def test_names_of_backends_are_checked():
    with pytest.raises(BackendError, match="backend 'sdxxl': expected one of digits, ldm") as caught:
        load_backend(Spec(backend="sdxxl"), CPU)
    assert "\n" not in str(caught.value)
