"""Training with offload: all prompts are encoded first, the text encoders freed, and what comes out stays the
same.
"""

import pytest

from backends.diffusers_pipeline import PipelineBackend
from backends.embeddings import EmbeddingCache
from solvers import load_predictor, resolve_predictor_path
from training.distill import launch as distill
from training.ppo import launch as ppo
from training.run_folder import RunFolder

from .ppo.test_launch import write_config as rdpo_config
from .stops import invoke

DISTILL = """
backend: {name: digits}
guidance_scale: 3.0
nodes: {num_steps: 3}
teacher: {inner: 1, check: 2}
bank: {folder: FOLDER/banks, prompts: FOLDER/prompts.txt, pairs: 6, heldout_pairs: 4, shard_size: 2}
train: {steps: 2, batch: 4, chunk: 2, checkpoint_interval: 1}
evaluation: {interval: 1, batch: 2, baselines: [euler], schedules: [discrete], tuning_pairs: 2}
"""
RDPO = ("data.prompt_csv=FOLDER/prompts.txt", "ppo.steps=2", "evaluation.interval=1")


def distill_config(folder):
    path = folder / "small.yaml"
    path.write_text(DISTILL.replace("FOLDER", str(folder)))
    return path


STAGES = {
    "rdpo": (ppo.main, rdpo_config, "--output-root", "model.backend_options.offload", RDPO),
    "distill": (distill.main, distill_config, "--exps", "backend.config.offload", ()),
}


@pytest.fixture
def watched(monkeypatch) -> list[str]:
    """Grows by a prompt with each that is encoded, and by "freed" when the text encoders of a backbone are
    freed.
    """
    events: list[str] = []
    call, offload_text_encoders = EmbeddingCache.__call__, PipelineBackend.offload_text_encoders

    def record_call(cache, prompt):
        events.extend([prompt] if prompt not in cache.known else [])
        return call(cache, prompt)

    def record_room(backend):
        closed = backend._embeddings.closed
        offload_text_encoders(backend)
        events.extend(["freed"] if backend._embeddings.closed and not closed else [])
        assert not backend._embeddings.closed or backend.pipe.text_encoder is None

    monkeypatch.setattr(EmbeddingCache, "__call__", record_call)
    monkeypatch.setattr(PipelineBackend, "offload_text_encoders", record_room)
    return events


def contents(run: RunFolder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run.metrics, *sorted(run.export.glob("*best.pkl")))}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_offload_is_a_run_without_and_can_be_resumed(tmp_path, watched, stage):
    main, write, root, key, more = STAGES[stage]
    found = {}
    for offload in ("false", "true"):
        folder = tmp_path / offload
        folder.mkdir()
        (folder / "prompts.txt").write_text(
            "\n".join(f"a thin {name}" for name in ("one", "two", "three", "four", "five"))
        )
        overrides = [
            part
            for text in (*more, f"{key}={offload}")
            for part in ("--override", text.replace("FOLDER", str(folder)))
        ]
        watched.clear()
        invoke(
            main,
            "--config",
            write(folder),
            root,
            folder / "exps",
            "--device",
            "cpu",
            "--max-steps",
            1,
            *overrides,
        )
        first = list(watched)
        run = RunFolder(next((folder / "exps").iterdir()))
        invoke(main, "--resume", run.path, root, folder / "exps", "--device", "cpu")
        found[offload] = contents(run)
        best = load_predictor(resolve_predictor_path(str(run.path)))
        assert "offload" not in best.spec.backend_config
    assert found["true"] == found["false"]
    assert first.count("freed") == 1
    assert first.index("freed") == len(first) - 1  # no prompt is encoded after that
    assert len(first) == len(set(first)) == 5 + 1 + 1  # five prompts and the negative one


def test_a_bank_that_is_complete_needs_no_encoder(tmp_path, watched):
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"a thin {name}" for name in ("one", "two", "three", "four", "five"))
    )
    arguments = ("--exps", tmp_path / "exps", "--device", "cpu", "--override", "backend.config.offload=true")
    invoke(distill.main, "--config", distill_config(tmp_path), *arguments)
    watched.clear()
    invoke(distill.main, "--config", tmp_path / "small.yaml", *arguments)
    assert watched == ["freed"]
