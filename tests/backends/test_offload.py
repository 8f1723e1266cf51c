"""Each prompt of a run is encoded once, and with offload before the network is on the device and the encoders
are gone.
"""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tiny import CPU
from tiny_flow import save_flux, save_sd3

from backends import BackendError, load_backend
from backends.embeddings import EmbeddingCache
from common.distributed import Ranks
from generation.generate import Output, Sampler, generate
from solvers import BASELINES, Spec

PROMPTS = ["a cat", "the dog, 8k!", "a photo of nothing"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    return {
        "ldm": tiny_folder,
        "sd3": save_sd3(tmp_path_factory.mktemp("sd3")),
        "flux": save_flux(tmp_path_factory.mktemp("flux")),
    }


def sampler_of(folders, family, **options):
    length = {} if family == "ldm" else {"max_sequence_length": 32}
    backend = load_backend(
        Spec(backend=family, backend_config={"model_name_or_path": str(folders[family])} | length | options),
        CPU,
    )
    return Sampler(
        backend, BASELINES["euler"], "euler", backend.sigmas(Spec(num_steps=3)), backend.default_guidance
    )


def encoded(sampler) -> list[int]:
    """Grows by one number, the rows, with each call of the first text encoder."""
    calls: list[int] = []
    sampler.backend.pipe.text_encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def made(sampler, folder: Path, prompts=PROMPTS, seeds=range(7), batch=2) -> dict[str, bytes]:
    """The files of a run by name."""
    generate(sampler, prompts, list(seeds), Output(folder, batch), Ranks(0, 1, CPU))
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("family", ["ldm", "sd3", "flux"])
def test_each_prompt_is_encoded_once_and_the_images_stay(folders, tmp_path, family):
    plain, saving = sampler_of(folders, family), sampler_of(folders, family, offload=True)
    counts = encoded(plain), encoded(saving)
    files = made(plain, tmp_path / "plain")
    assert len(files) == 7
    assert made(saving, tmp_path / "saving") == files
    wanted = [1] * (len(PROMPTS) + (family != "flux"))  # and the negative prompt
    assert counts == (wanted, wanted)


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_that_goes_on_encodes_what_it_needs(folders, tmp_path, offload):
    files = made(sampler_of(folders, "ldm", offload=offload), tmp_path)
    (tmp_path / "000000" / "000003.png").unlink()  # of the batch with the prompts 2 and 0
    sampler = sampler_of(folders, "ldm", offload=offload)
    calls = encoded(sampler)
    assert made(sampler, tmp_path) == files
    assert len(calls) == 3
    done = sampler_of(folders, "ldm", offload=offload)
    calls = encoded(done)
    assert made(done, tmp_path) == files
    assert calls == []


def test_encoders_are_freed_before_the_rest_is_placed(folders, monkeypatch):
    sampler = sampler_of(folders, "sd3", offload=True)
    pipe, bound = sampler.backend.pipe, []
    parts = [
        weakref.ref(pipe.components[name]) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    ]
    weights = [weakref.ref(p) for part in parts for p in part().parameters()]
    monkeypatch.setattr(type(pipe), "to", lambda self, device: bound.append([r() for r in parts + weights]))
    sampler.backend.precompute_embeddings(PROMPTS, 4.5)
    gc.collect()
    assert bound == [[None] * len(parts + weights)]
    assert [pipe.components[name] for name in ("text_encoder", "text_encoder_2", "text_encoder_3")] == [
        None
    ] * 3
    sampler.backend.precompute_embeddings(PROMPTS[:1], 4.5)
    assert len(bound) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_network_reaches_the_device_after_the_encoders(folders):
    config = {"model_name_or_path": str(folders["ldm"]), "offload": True}
    backend = load_backend(Spec(backend="ldm", backend_config=config), "cuda")
    assert (backend.pipe.text_encoder.device.type, backend.pipe.unet.device.type) == ("cuda", "cpu")
    backend.precompute_embeddings(PROMPTS, 4.0)
    assert (backend.pipe.unet.device.type, backend.pipe.vae.device.type) == ("cuda", "cuda")
    assert backend.encode(PROMPTS, 4.0).positive["text"].device.type == "cuda"


def test_a_prompt_too_late_is_one_line(folders):
    sampler = sampler_of(folders, "ldm", offload=True)
    assert (
        sampler.latents(PROMPTS[:1], [0]).isfinite().all()
    )  # without precompute_embeddings: its prompts are encoded before the network runs
    assert sampler.latents(PROMPTS[:1], [1]).isfinite().all()
    with pytest.raises(
        BackendError,
        match=r"^offload: the text encoders are freed, and prompt 'the dog, 8k!' was not encoded before",
    ) as caught:
        sampler.latents(PROMPTS[1:2], [0])
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match="a fingerprint is of all weights"):
        sampler.backend.fingerprint()


def test_too_many_prompts_are_refused_at_the_first(folders):
    sampler = sampler_of(folders, "ldm", offload=True)
    calls = encoded(sampler)
    sampler.backend._embeddings.limit = 3 * 77 * 32 * 4  # three embeddings: two prompts and the negative one
    with pytest.raises(BackendError, match="the embeddings of 4 prompts need"):
        sampler.backend.precompute_embeddings(PROMPTS, 4.0)
    assert len(calls) == 2
    sampler.backend.precompute_embeddings(PROMPTS[:2], 4.0)


def test_the_newest_embeddings_are_kept():
    calls = []
    cache = EmbeddingCache(
        lambda prompt: calls.append(prompt) or {"text": torch.zeros(1, 4)}, CPU, limit=2 * 4 * 4
    )
    for prompt in "abcbc":
        cache(prompt)
    assert calls == ["a", "b", "c"]
    assert list(cache.known) == ["b", "c"]


def test_decoding_by_itself_places_the_decoder(folders, monkeypatch):
    backend, bound = sampler_of(folders, "ldm", offload=True).backend, []
    monkeypatch.setattr(type(backend.pipe), "to", lambda self, device: bound.append(device))
    assert backend.decode(torch.zeros(1, *backend.latent_shape)).isfinite().all()
    assert bound == [CPU]


def test_the_cache_holds_a_long_run(folders):
    """FLUX.1's embeddings take 4 MB each: those of a thousand prompts fit."""
    assert EmbeddingCache(lambda prompt: {}, CPU).limit >= 1000 * 512 * 4096 * 2


def test_it_contradicts_moving_networks_back_and_forth(folders):
    with pytest.raises(
        BackendError, match="offload frees the text encoders, enable_model_cpu_offload keeps them"
    ):
        sampler_of(folders, "ldm", offload=True, enable_model_cpu_offload=True)
    with pytest.raises(BackendError, match="offload is 1, expected bool"):
        sampler_of(folders, "ldm", offload=1)
