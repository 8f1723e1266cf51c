"""Conditions and their rows, and the noise that a seed starts from."""

import pytest
import torch
from tiny import CPU
from torch.utils._python_dispatch import TorchDispatchMode

from backends import Condition, initial_noise
from backends.conditioning import apply_cfg, repeat_condition


class Copies(TorchDispatchMode):
    """Counts the values written by operations that are no views of what they are given."""

    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.values += 0 if operation.is_view else made.numel()
        return made


def make(rows=3, guidance=4.0):
    """Rows 0, 1, 2, ... and negative -1, in two tensors of different ranks."""
    numbers = torch.arange(float(rows))
    positive = {
        "text": numbers.view(-1, 1, 1).expand(-1, 2, 5).clone(),
        "pooled": numbers.view(-1, 1).clone(),
    }
    negative = {"text": torch.full((1, 2, 5), -1.0), "pooled": torch.full((1, 1), -1.0)}
    return Condition(positive, None if guidance == 1 else negative, guidance)


def numbers(rows):
    """The number of each row, the same in both tensors."""
    assert torch.equal(rows["text"][:, 0, 0], rows["pooled"][:, 0])
    assert torch.equal(rows["text"], rows["pooled"][..., None].expand(-1, 2, 5))
    return rows["pooled"][:, 0].tolist()


def test_length():
    assert (len(make(3)), len(make(1)), len(make(3).repeat(2))) == (3, 1, 6)


def test_repeat_is_point_major():
    repeated = make().repeat(3)
    assert numbers(repeated.positive) == [0, 1, 2] * 3
    assert numbers(repeated.negative) == [-1]
    assert repeated.guidance_scale == 4.0
    assert numbers(make().positive) == [0, 1, 2]


@pytest.mark.parametrize("indices", [[2, 0], (1,), range(1, 3), [1, 1, 0]])
def test_select(indices):
    chosen = make().select(indices)
    assert numbers(chosen.positive) == list(indices)
    assert numbers(chosen.negative) == [-1]
    assert chosen.guidance_scale == 4.0


@pytest.mark.parametrize("guidance", [1, 4.0])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_guided_batch(times, guidance):
    """Of `times` points as of the repeated condition, which in turn is that of its rows."""
    rows = make(guidance=guidance).guided_batch(times)
    assert numbers(rows) == [-1] * 3 * times * (guidance != 1) + [0, 1, 2] * times
    assert numbers(make(guidance=guidance).repeat(times).guided_batch()) == numbers(rows)


def test_a_guided_batch_is_one_copy():
    """Without guidance, of as many rows as the condition, none."""
    alone, guided = make(guidance=1), make()
    with Copies() as copies:
        assert alone.guided_batch()["text"] is alone.positive["text"]
    assert copies.values == 0
    with Copies() as copies:
        guided.guided_batch(2)
    assert copies.values == 12 * (2 * 5 + 1)


def test_repeated_conditions_are_kept_for_each_number_of_rows():
    condition, cache = make(), {}
    first = repeat_condition(condition, 6, cache)
    assert numbers(first) == [-1] * 6 + [0, 1, 2] * 2
    assert numbers(repeat_condition(condition, 3, cache)) == [-1] * 3 + [0, 1, 2]
    assert repeat_condition(condition, 6, cache) is first
    for rows in (0, 2, 4):
        with pytest.raises(ValueError, match=f"{rows} rows for a condition of 3 images"):
            repeat_condition(condition, rows, cache)


def test_classifier_free_guidance():
    u, c = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-4.0]])
    guided = apply_cfg(torch.cat([u, c]).bfloat16(), make(2, 4.0))
    assert guided.dtype == torch.float32
    assert guided.flatten().tolist() == [1 + 4 * 2, 2 + 4 * -6]
    assert torch.equal(apply_cfg(c, make(2, 1)), c)


def test_a_condition_is_frozen():
    with pytest.raises(AttributeError):
        make().guidance_scale = 2.0


def test_noise_depends_on_the_seed_only():
    noise = initial_noise([7, 3, 2**32 - 1], (4, 8, 8))
    assert noise.dtype == torch.float32
    assert noise.shape == (3, 4, 8, 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(initial_noise([3], (4, 8, 8))[0], noise[1])
    assert torch.equal(initial_noise([2**32 - 1, 7], (4, 8, 8)), noise[[2, 0]])
    assert torch.equal(torch.get_rng_state(), before)
    by_hand = torch.randn(4, 8, 8, generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(noise[0], by_hand)
    assert not torch.equal(noise[0], noise[1])


def test_noise_has_unit_variance():
    noise = initial_noise(range(200), (4, 8, 8))
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_initial_latents(tiny, gaussian):
    for backend in (tiny, gaussian):
        expected = 14.5 * initial_noise([5, 6], backend.latent_shape)
        for sigma in (14.5, torch.tensor(14.5, dtype=torch.float64)):
            latents = backend.initial_latents([5, 6], sigma)
            assert latents.dtype == torch.float32
            assert latents.device == CPU
            assert torch.equal(latents, expected)
