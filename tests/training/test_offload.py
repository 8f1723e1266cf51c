"""Training with offload: all prompts are encoded first, the text encoders freed, and what comes out stays the
same.
"""

import pytest

from backends.diffusers_pipeline import PipelineBackend
from backends.embeddings import EmbeddingCache
from solvers import load_predictor, resolve_predictor_path
from training.run_folder import RunFolder

from .runs import DISTILL, ROOT, invoke

DISTILL_DIGITS = """
backend: {name: digits}
guidance_scale: 3.0
nodes: {num_steps: 3}
teacher: {inner: 1, check: 0}
bank: {folder: FOLDER/banks, prompts: FOLDER/prompts.txt, pairs: 6, heldout_pairs: 4, shard_size: 2}
train: {steps: 2, batch: 2, chunk: 2, checkpoint_interval: 1}
evaluation: {interval: 1, batch: 2, baselines: [], tuning_pairs: 2}
"""
RDPO_SETTINGS = (
    "ppo.steps=2",
    "ppo.rollout_batch_size=2",
    "ppo.rollout_chunk=2",
    "ppo.minibatch_size=2",
    "evaluation.interval=1",
    "evaluation.images=2",
)
PROMPTS = "\n".join(f"a thin {name}" for name in ("one", "two", "three", "four", "five"))


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Grows by a prompt with each that is encoded, and by "freed" when the text encoders of a backbone are
    freed.
    """
    events: list[str] = []
    call, offload_text_encoders = EmbeddingCache.__call__, PipelineBackend.offload_text_encoders

    def record_call(cache, prompt):
        events.extend([prompt] if prompt not in cache.known else [])
        return call(cache, prompt)

    def record_offload(backend):
        closed = backend._embeddings.closed
        offload_text_encoders(backend)
        events.extend(["freed"] if backend._embeddings.closed and not closed else [])
        assert not backend._embeddings.closed or backend.pipe.text_encoder is None

    monkeypatch.setattr(EmbeddingCache, "__call__", record_call)
    monkeypatch.setattr(PipelineBackend, "offload_text_encoders", record_offload)
    return events


def results(run: RunFolder) -> dict[str, bytes]:
    """The metrics and the best table of a run."""
    return {p.name: p.read_bytes() for p in (run.metrics, *sorted(run.export.glob("*best.pkl")))}


def test_a_run_with_offload_is_a_run_without_and_can_be_resumed(tmp_path, events, stage):
    runs, settings = {}, {}
    for offload in ("false", "true"):
        folder = tmp_path / offload
        folder.mkdir()
        stage.write_config(folder)
        (folder / "prompts.txt").write_text(PROMPTS)
        if stage is DISTILL:
            (folder / "small.yaml").write_text(DISTILL_DIGITS.replace("FOLDER", str(folder)))
            settings[offload] = (f"backend.config.offload={offload}",)
        else:
            start = f"data.predictor_snapshot={ROOT / 'exps/digits'}"
            settings[offload] = (*RDPO_SETTINGS, start, f"model.backend_options.offload={offload}")
    runs["false"] = stage.start(tmp_path / "false", "run", *settings["false"])
    events.clear()
    runs["true"] = stage.start(tmp_path / "true", "run", *settings["true"], more=("--max-steps", 1))
    first = list(events)
    stage.resume(runs["true"])
    assert results(runs["true"]) == results(runs["false"])
    best = load_predictor(resolve_predictor_path(str(runs["true"].path)))
    assert "offload" not in best.spec.backend_config
    assert first.count("freed") == 1
    assert first.index("freed") == len(first) - 1  # no prompt is encoded after that
    assert len(first) == len(set(first)) == 5 + 1 + 1  # five prompts and the negative one
    if stage is DISTILL:  # a bank that is complete needs no encoder
        events.clear()
        again = stage.arguments(tmp_path / "true", "again", *settings["true"], "train.steps=1")
        invoke(stage.main, *again)
        assert events == ["freed"]
