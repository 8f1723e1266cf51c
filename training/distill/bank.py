"""The bank: teacher trajectories and conditions of (prompt, seed) pairs, computed once and kept on disk."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from backends import Backend, Condition
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks, rank_parts
from common.files import write_atomically
from solvers import Solver, UserError, trajectory

from ..processes import Processes
from .config import BankConfig

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}  # of states on disk


class BankError(UserError):
    """A bank that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Pairs:
    """Prompts and the seeds of their noise, pair by pair."""

    prompts: list[str]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class Teacher:
    """A solver on fine nodes [I + 1]; the states at every `every`-th node are what students should reach."""

    name: str
    solver: Solver
    nodes: Tensor
    every: int

    @property
    def kept(self) -> Tensor:
        """The nodes whose states are kept, the first included."""
        return self.nodes[:: self.every]

    def states(self, backend: Backend, condition: Condition, x: Tensor, points: ParallelEvaluator) -> Tensor:
        """The states at the kept nodes after the first: [kept - 1, B, C, H, W]."""
        with torch.inference_mode():
            states = list(trajectory(self.solver, points.velocity(backend, condition), x, self.nodes))
        return torch.stack(states[self.every - 1 :: self.every])


class Bank:
    """Teacher states and conditions of pairs, in shards under a folder named by everything that they depend
    on.
    """

    def __init__(
        self,
        settings: BankConfig,
        backend: Backend,
        teacher: Teacher,
        guidance_scale: float,
        pairs: Pairs,
    ):
        self.backend, self.teacher, self.guidance_scale = backend, teacher, guidance_scale
        self.pairs, self.shard_size, self.dtype = pairs, settings.shard_size, DTYPES[settings.dtype]
        self.contents = {
            "format": FORMAT,
            "backbone": f"{backend.name}: {backend.identity()}",
            "fingerprint": backend.fingerprint(),
            "options": backend.image_options(),
            "network_dtype": str(backend.dtype),
            "guidance": guidance_scale,
            "teacher": teacher.name,
            "nodes": teacher.nodes.tolist(),
            "every": teacher.every,
            "prompts": hashlib.sha256("\0".join(pairs.prompts).encode()).hexdigest(),
            "seeds": hashlib.sha256(repr(pairs.seeds).encode()).hexdigest(),
            "pairs": len(pairs),
            "shard_size": settings.shard_size,
            "dtype": settings.dtype,
        }
        # how many rows a network call may have, of shards and of evaluations
        self.building, self.measuring = ParallelEvaluator(), ParallelEvaluator()
        self.key = hashlib.sha256(json.dumps(self.contents, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(settings.folder) / self.key

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.shard_size)

    def missing(self, ranks: Ranks) -> list[int]:
        """The shards that are not on disk, as rank 0 sees it."""
        return ranks.broadcast([i for i in range(self.num_shards) if not self.path(i).is_file()])

    def missing_prompts(self, ranks: Ranks) -> list[str]:
        """The prompts of the shards that are not on disk."""
        return [prompt for i in self.missing(ranks) for prompt in self.pairs.prompts[self.pairs_of(i)]]

    def pairs_of(self, shard: int) -> slice:
        """The pairs in a shard."""
        return slice(shard * self.shard_size, (shard + 1) * self.shard_size)

    def build(self, processes: Processes, name: str) -> None:
        """Compute the shards that are not there yet, shared over the ranks; an interrupted build goes on.

        A stop ends it after the shard in hand: StopRequested. `name` is for the progress bar.
        """
        ranks = processes.ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = self.missing(ranks)
        if processes.first:
            write_atomically(self.folder / "bank.json", (json.dumps(self.contents, indent=1) + "\n").encode())
        own = rank_parts(missing, ranks, processes.stop_requested)
        count = len(missing[ranks.rank :: ranks.world])
        hidden = not processes.first or not count or None
        for i in tqdm(own, desc=f"teacher, {name}", total=count, unit="shard", disable=hidden):
            write_atomically(self.path(i), save(self._compute(i)))
        ranks.barrier()

    def _compute(self, shard: int) -> dict[str, Tensor]:
        rows = self.pairs_of(shard)
        condition = self.backend.encode(self.pairs.prompts[rows], self.guidance_scale)
        x = self.backend.initial_latents(self.pairs.seeds[rows], self.teacher.nodes[0])
        states = self.teacher.states(self.backend, condition, x, self.building).transpose(0, 1)
        tensors = {
            "states": states.to(self.dtype),
            **{f"positive.{k}": v for k, v in condition.positive.items()},
            **{f"negative.{k}": v for k, v in (condition.negative or {}).items()},
        }
        if not states.isfinite().all():
            raise BankError(
                f"the teacher {self.teacher.name} left the finite numbers; use more inner nodes or another"
                " teacher.solver"
            )
        return {k: v.contiguous().cpu() for k, v in tensors.items()}

    def row(self, index: int) -> dict[str, Tensor]:
        """What is stored of one pair, as one row each; nothing else of its shard is read."""
        path, at = self.path(index // self.shard_size), index % self.shard_size
        try:
            with safe_open(path, "pt") as file:
                return {
                    k: file.get_tensor(k) if k.startswith("negative.") else file.get_slice(k)[at : at + 1]
                    for k in file.keys()  # noqa: SIM118
                }
        except (OSError, SafetensorError) as error:
            if not path.exists():
                raise BankError(
                    f"{path}: does not exist; bank.folder must be on storage that all ranks share (a shard"
                    " that was removed is made again by the same command)"
                ) from None
            reason = str(error).splitlines()[0]
            raise BankError(
                f"{path}: cannot be read ({reason}); remove the file, and it is made again"
            ) from None

    def rows(self, indices: list[int]) -> tuple[Condition, Tensor, Tensor]:
        """Conditions, starts [B, C, H, W] at the first node and teacher states [kept - 1, B, C, H, W] of
        pairs, on the device.
        """
        device, pairs = self.backend.device, [self.row(i) for i in indices]
        joined = {
            k: (v if k.startswith("negative.") else torch.cat([row[k] for row in pairs])).to(device)
            for k, v in pairs[0].items()
        }
        positive, negative = (
            {k.removeprefix(kind): v for k, v in joined.items() if k.startswith(kind)}
            for kind in ("positive.", "negative.")
        )
        start = self.backend.initial_latents([self.pairs.seeds[i] for i in indices], self.teacher.nodes[0])
        return (
            Condition(positive, negative or None, self.guidance_scale),
            start,
            joined["states"].float().transpose(0, 1),
        )


def refined(coarse: Tensor, fine: Tensor, every: int) -> Tensor:
    """Fine nodes [I * every + 1] with the coarse ones [I + 1] put in their places, which they must hit but
    for rounding.
    """
    if len(fine) != (len(coarse) - 1) * every + 1 or not torch.allclose(
        fine[::every], coarse, rtol=1e-9, atol=1e-12
    ):
        raise ValueError("teacher nodes: the refined schedule does not contain the nodes that it refines")
    fine = fine.clone()
    fine[::every] = coarse
    return fine


def twice_as_fine(nodes: Tensor) -> Tensor:
    """Nodes with one more in the middle of each interval: geometric, or half of the first where the second is
    0.
    """
    middle = torch.where(nodes[1:] > 0, (nodes[1:] * nodes[:-1]).sqrt(), nodes[:-1] / 2)
    return torch.cat([torch.stack([nodes[:-1], middle], 1).flatten(), nodes[-1:]])


def rmse_per_image(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of states [B, ...], image by image, in float64: [B]."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt()
