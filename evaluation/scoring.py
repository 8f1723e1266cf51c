"""Scoring a folder of images with a metric, batch by batch, on any number of processes."""

from dataclasses import dataclass
from math import isfinite

from tqdm import tqdm

from common.distributed import Ranks
from common.records import identity
from common.same_run import check_same, locked_by_run
from rewards import Reward

from .images import ImageSet, decode, hash_of
from .provenance import Training
from .scores import FOLDER, ScoreFile, ScoresError, protocol_id, protocol_of, summarise, write_summary


@dataclass(frozen=True)
class Metric:
    """A reward, what its scores are called, and how many images it scores at a time."""

    name: str
    reward: Reward
    batch: int


def score_images(images: ImageSet, metric: Metric, training: Training, ranks: Ranks) -> dict | None:
    """Write a line for each image and the summary, which rank 0 returns.

    Batches are fixed by position and divided whole among the ranks. An image that is scored already keeps its
    line; a batch that lacks one is scored as a whole, so that a run that was interrupted ends in the very
    same files.
    """
    protocol = protocol_id(protocol_of(metric.reward))
    same = {"images": images.records, "settings of images": images.settings, "metric": metric.name}
    check_same(ranks, same | {"protocol": protocol, "--batch": metric.batch})
    (images.folder / FOLDER).mkdir(exist_ok=True)
    with locked_by_run(images.folder / FOLDER, ranks, "wait for it"):
        known = ScoreFile(images, metric.name, protocol, ranks.rank)
        ranks.barrier()  # every rank has read what an earlier run left
        if ranks.rank == 0:
            known.gather()
        ranks.barrier()
        starts = range(0, len(images.records), metric.batch)
        batches = [images.records[i : i + metric.batch] for i in starts][ranks.rank :: ranks.world]
        total, hidden = sum(map(len, batches)), ranks.rank > 0 or None
        with tqdm(total=total, unit="image", desc=metric.name, disable=hidden) as bar:
            for records in batches:
                score_batch(images, records, metric.reward, known)
                bar.update(len(records))
        ranks.barrier()
        summary = None
        if ranks.rank == 0:
            lines = ScoreFile(images, metric.name, protocol, 0).gather()
            check_complete(lines, images, metric.name)
            summary = summarise(lines, metric.name, metric.reward, images, training)
            write_summary(images.folder, summary)
        ranks.barrier()
    return summary


def check_complete(lines: list[dict], images: ImageSet, metric: str) -> None:
    """Refuse fewer scores than images."""
    scored = {line["file"] for line in lines}
    lacking = [record["file"] for record in images.records if record["file"] not in scored]
    if lacking:
        raise ScoresError(
            f"{images.folder}: {len(lacking)} of {len(images.records)} images have no {metric} score, such as"
            f" {lacking[0]}; all ranks must share this folder: run the same command again"
        )


def score_batch(images: ImageSet, records: list[dict], reward: Reward, known: ScoreFile) -> None:
    """Score a batch and add the lines that are missing."""
    contents = [images.content(record) for record in records]
    hashes = [hash_of(content) for content in contents]
    missing = [i for i, record in enumerate(records) if not known.has(record, hashes[i])]
    if not missing:
        return
    heads = reward.heads(
        decode(contents, [images.folder / r["file"] for r in records]), [r["prompt"] for r in records]
    )
    total, parts = reward.combine(heads).tolist(), {name: scores.tolist() for name, scores in heads.items()}
    lines = []
    for i in missing:
        if not isfinite(total[i]):
            raise ScoresError(
                f"metric {known.metric} gives {total[i]} for {images.folder / records[i]['file']}, expected a"
                " finite number"
            )
        own = {"heads": {name: scores[i] for name, scores in parts.items()}} if reward.parts else {}
        made = {"score": total[i], "image": hashes[i], "protocol": known.protocol}
        lines.append(identity(records[i]) | made | own)
    known.add(lines)
