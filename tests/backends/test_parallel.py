"""The points of a level in one call, in several, and on several processes: the same state to rounding."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from backends import BackendError, Condition, load_backend
from backends.parallel import ParallelEvaluator
from common.distributed import process_group
from solvers import BASELINES, EPD, SolverTable, Spec, compile_tableau, sample

from ..forked import Forked

NODES = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64)


def some_images(count: int) -> Condition:
    return Condition({"text": torch.arange(1.0, count + 1)}, None, 1.0)


class Memory:
    """A velocity that depends on the condition, on a device that holds no more than `limit` rows."""

    def __init__(self, limit: int):
        self.limit, self.rows = limit, []

    def velocity(self, condition):
        def velocity(x, sigma):
            self.rows.append(len(x))
            if len(x) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
            numbers = condition.repeat(len(x) // len(condition)).positive["text"]
            return torch.sin(3 * x) * (numbers * sigma.expand(len(x))).view(-1, 1)

        return velocity


@pytest.mark.parametrize(
    "limit, sizes", [(12, {3, 12}), (11, {3, 6}), (6, {3, 6}), (5, {3}), (2, {2, 1}), (1, {1})]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_calls_are_halved_where_memory_ends(limit, sizes, compiled):
    """First to fewer points, then to fewer images."""
    x, solver = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), EPD(SolverTable.uniform(3, 4))
    if compiled:
        solver = compile_tableau(solver, NODES)
    whole = sample(solver, ParallelEvaluator().velocity(Memory(100), some_images(3)), x, NODES)
    small, points = Memory(limit), ParallelEvaluator()
    assert torch.equal(sample(solver, points.velocity(small, some_images(3)), x, NODES), whole)
    assert {n for n in small.rows if n <= limit} == sizes
    failures = sum(n > limit for n in small.rows)
    sample(solver, points.velocity(small, some_images(3)), x, NODES)
    assert sum(n > limit for n in small.rows) == failures  # it remembers


def test_an_odd_number_of_points_is_halved_upwards():
    memory, points = Memory(3), ParallelEvaluator()
    x = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        points.velocity(memory, some_images(1))(x, NODES[0]), Memory(9).velocity(some_images(1))(x, NODES[0])
    )
    assert memory.rows == [5, 3, 2]


def test_calls_of_several_images_hold_whole_points():
    memory, points = Memory(7), ParallelEvaluator()
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    points.velocity(memory, some_images(2))(x, NODES[0])
    assert memory.rows == [10, 6, 4]


def test_one_image_that_does_not_fit_is_one_line():
    with pytest.raises(BackendError, match="out of memory with one image in a call") as error:
        sample(
            EPD(SolverTable.uniform(3, 4)),
            ParallelEvaluator().velocity(Memory(0), some_images(2)),
            torch.zeros(2, 5),
            NODES,
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["ldm", "flux"])
def test_parts_of_a_real_batch_are_the_batch(family):
    """Captions and levels go with their images, whatever a call holds."""
    backend = load_backend(Spec(backend="digits", backend_config={"family": family}), "cpu")
    condition = backend.encode(
        ["a red handwritten seven", "a bold six", "a thin blue two"], backend.default_guidance
    )
    x, levels = (
        backend.initial_latents(range(6), 0.5),
        torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.6], dtype=torch.float64),
    )
    with torch.inference_mode():
        whole = backend.velocity(condition)(x, levels)
        for rows in (3, 2, 1):
            torch.testing.assert_close(
                ParallelEvaluator(rows=rows).velocity(backend, condition)(x, levels),
                whole,
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("family", ["ldm", "sd3"])
def test_the_halves_of_guidance_are_conditions_of_their_own(family):
    backend = load_backend(
        Spec(backend="digits", backend_config={"family": family, "negative_prompt": "a blue two"}), "cpu"
    )
    condition = backend.encode(["a red handwritten seven", "a bold six"], 3.0)
    x, sigma = backend.initial_latents([0, 1], 1.0), torch.tensor([0.8, 0.4], dtype=torch.float64)
    with torch.inference_mode():
        negative, positive = (backend.velocity(part)(x, sigma) for part in condition.branches())
        torch.testing.assert_close(
            negative + 3 * (positive - negative), backend.velocity(condition)(x, sigma), rtol=1e-4, atol=1e-4
        )
    unguided = backend.encode(["a bold six"], 1.0)
    assert unguided.branches() == [unguided]


SOLVERS = ("epd1", "epd2", "epd3", "tableau", "dpmpp")


def of_a_rank(out: Path, cases: dict[str, tuple[str, ...]]) -> None:
    """One of a group: the solvers of each family alone and divided among the ranks, in float32."""
    rows = []
    with process_group("cpu") as ranks:
        gathers = []
        all_gather = dist.all_gather
        dist.all_gather = lambda parts, own: gathers.append(own.shape) or all_gather(parts, own)
        for family, names in cases.items():
            backend = load_backend(Spec(backend="digits", backend_config={"family": family}), "cpu")
            condition = backend.encode(["a red handwritten seven", "a thin six"], backend.default_guidance)
            nodes = backend.sigmas(Spec(num_steps=3))
            x = backend.initial_latents([0, 1], nodes[0])
            tables = {f"epd{k}": EPD(SolverTable.uniform(2, k)) for k in (1, 2, 3)}
            solvers = tables | {
                "tableau": compile_tableau(tables["epd3"], nodes),
                "dpmpp": BASELINES["dpmpp"],
            }
            for name in names:
                solver = solvers[name]
                with torch.inference_mode():
                    alone = sample(solver, backend.velocity(condition), x, nodes)
                    for branches in (False, True):
                        gathers.clear()
                        state = sample(
                            solver, ParallelEvaluator(ranks, branches).velocity(backend, condition), x, nodes
                        )
                        states = [torch.empty_like(state) for _ in range(ranks.world)]
                        all_gather(states, state)
                        rows.append(
                            {
                                "case": f"{family} {name} branches={branches}",
                                "off": ((state - alone).abs().max() / alone.abs().max()).item(),
                                "same": all(torch.equal(s, state) for s in states),
                                "gathers": len(gathers),
                                "split": branches and condition.negative is not None,
                                "levels": [len(level) for level in compile_tableau(solver, nodes).levels],
                            }
                        )
        if ranks.rank == 0:
            out.write_text(json.dumps([dist.get_backend(), rows]))


@pytest.mark.parametrize(
    "processes, cases",
    [(2, {"sd3": SOLVERS, "ldm": ("epd3",), "flux": ("epd3",)}), (4, {"sd3": ("epd2", "epd3")})],
    ids=str,
)
def test_points_over_processes_give_the_same_state(tmp_path, processes, cases):
    """EPD's K points, uneven shares and idle ranks too: one all-gather for each level that is divided, one
    state on all ranks.
    """
    done = Forked(of_a_rank, tmp_path / "rows.json", cases, ranks=processes).wait()
    assert done.returncode == 0, done.stderr
    kind, rows = json.loads((tmp_path / "rows.json").read_text())
    assert kind == "gloo"
    assert len(rows) == 2 * sum(map(len, cases.values()))
    for row in rows:
        assert row["off"] < 2e-5, row
        assert row["same"], row
        assert row["gathers"] == sum(row["split"] or width > 1 for width in row["levels"]), row
        if row["case"].split()[1] in ("epd2", "epd3", "tableau") and not row["split"]:
            assert row["gathers"] == 2, row  # one for each of the two steps
