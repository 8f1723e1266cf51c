"""The scores of an image folder: scores/<metric>.jsonl, a line an image, and scores/<metric>.summary.json."""

import hashlib
import json
from dataclasses import asdict, dataclass
from math import isclose, isfinite
from pathlib import Path
from statistics import fmean

import common.records as manifest
from common.files import read_file, write_atomically
from common.statistics import BOOTSTRAP, RESAMPLES, SEED, Estimate, estimate
from rewards import Reward
from solvers import UserError

from .images import ImageSet
from .provenance import Training

FOLDER = "scores"
LINE: manifest.Fields = {
    **manifest.IDENTITY,
    "score": (float,),
    "image": (str,),
    "protocol": (str,),
}
SUMMARY: manifest.Fields = {
    "metric": (str,),
    "count": (int,),
    "prompts": (int,),
    "mean": (float,),
    "standard_error": (float, type(None)),
    "interval": (list, type(None)),
    "trained_on": (bool, type(None)),
    "protocol_id": (str,),
    "protocol": (dict,),
    "images": (dict,),
}


class ScoresError(UserError):
    """Scores that are missing, damaged or unlike those asked for; the message is one line for the user."""


def scores_path(folder: Path, metric: str) -> Path:
    """Where the lines of a metric go."""
    return folder / FOLDER / f"{metric}.jsonl"


def summary_path(folder: Path, metric: str) -> Path:
    """Where the summary of a metric goes."""
    return folder / FOLDER / f"{metric}.summary.json"


def metrics_of(folder: Path) -> list[str]:
    """The metrics that an image folder has summaries of."""
    return sorted(
        path.name.removesuffix(".summary.json") for path in (folder / FOLDER).glob("*.summary.json")
    )


def protocol_of(reward: Reward) -> dict:
    """A reward's protocol as it comes back from JSON."""
    return json.loads(json.dumps(reward.protocol()))


def protocol_id(protocol: dict) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> list[dict]:
    """The complete lines of a file of scores or of a part of it; one that is no score: ManifestError."""
    return manifest.read_records(path, LINE, "score all images anew")


class ScoreFile:
    """The lines of a metric by image file, and this rank's part for new ones."""

    def __init__(self, images: ImageSet, metric: str, protocol: str, rank: int):
        self.images, self.metric, self.protocol = images, metric, protocol
        self.path = scores_path(images.folder, metric)
        self.part = manifest.part_of(self.path, rank)
        self.lines: dict[str, dict] = {}
        for path in [self.path, *manifest.parts_of(self.path)]:
            for line in read_lines(path):
                if line["protocol"] != protocol:
                    raise ScoresError(
                        f"{path} holds {metric} scores of protocol {line['protocol']}, but this run has"
                        f" {protocol} (version, weights, preprocessing or options differ); remove the file to"
                        " score anew"
                    )
                self.lines[line["file"]] = line

    def has(self, record: dict, image: str) -> bool:
        """Whether this very image (file, seed, prompt, hash of its bytes) is scored."""
        line = self.lines.get(record["file"], {})
        return line.items() >= (manifest.identity(record) | {"image": image}).items()

    def add(self, lines: list[dict]) -> None:
        """Append lines to this rank's part."""
        manifest.append_records(self.part, lines)

    def gather(self) -> list[dict]:
        """Put the lines of the images into the one file, in their order."""
        lines = [self.lines[r["file"]] for r in self.images.records if r["file"] in self.lines]
        manifest.replace_records(self.path, lines)
        return lines


@dataclass(frozen=True)
class Scores:
    """The lines and the summary of a metric, of one image folder."""

    folder: Path
    metric: str
    lines: list[dict]
    summary: dict

    def pairs(self) -> dict[tuple[str, int], dict]:
        """The lines by prompt and seed; one that is there twice: ScoresError."""
        by_pair: dict[tuple[str, int], dict] = {}
        for line in self.lines:
            key = line["prompt"], line["seed"]
            if key in by_pair:
                which = f"{by_pair[key]['file']} and {line['file']}"
                raise ScoresError(
                    f"{self.folder}: {which} both have prompt {manifest.short(key[0])} and seed {key[1]};"
                    " keep one of the two"
                )
            by_pair[key] = line
        return by_pair


def estimate_of(lines: list[dict]) -> Estimate:
    """Mean, standard error and interval of scores."""
    return estimate([line["score"] for line in lines], [line["prompt"] for line in lines])


def summarise(lines: list[dict], metric: str, reward: Reward, images: ImageSet, training: Training) -> dict:
    """The summary of a metric: its estimate, its protocol, the settings of the images.

    Args:
        lines: the scores, a line an image.
        metric: what they are called.
        reward: what they were made with.
        images: what they were made of.
        training: the rewards that the solver was trained on, for `trained_on`.
    """
    mean, protocol, parts = estimate_of(lines), protocol_of(reward), list(reward.parts)
    made = {"bootstrap": {"resamples": RESAMPLES, "seed": SEED}} if mean.method == BOOTSTRAP else {}
    heads = {head: sum(line["heads"][head] for line in lines) / len(lines) for head in parts}
    return {
        "metric": metric,
        **asdict(mean),
        **made,
        **({"heads": heads} if "heads" in lines[0] else {}),
        "trained_on": training.covers([metric, *parts]),
        "protocol_id": protocol_id(protocol),
        "protocol": protocol,
        "images": images.settings,
    }


def write_summary(folder: Path, summary: dict) -> None:
    """Write a summary beside the lines; the same content is left untouched."""
    path = summary_path(folder, summary["metric"])
    content = (
        json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def read_scores(folder: Path, metric: str) -> Scores:
    """The scores of a metric; none, unfinished ones, or a summary of others: ScoresError."""
    again = f"run evaluate.py score --images {folder} --metrics {metric}"
    path, beside = scores_path(folder, metric), summary_path(folder, metric)
    if not beside.is_file() or not path.is_file():
        raise ScoresError(f"{folder} has no {metric} scores; {again}")
    if manifest.parts_of(path):
        raise ScoresError(f"{folder}: scoring with {metric} was not finished; {again}")
    lines, summary = read_lines(path), read_summary(beside, again)
    mean = fmean(line["score"] for line in lines) if lines else 0.0
    identity = [summary[k] for k in ("metric", "count", "protocol_id")]
    same_mean = isclose(summary["mean"], mean, rel_tol=1e-9, abs_tol=1e-12)
    if not lines or identity != [metric, len(lines), lines[0]["protocol"]] or not same_mean:
        raise ScoresError(f"{beside} does not belong to the lines of {path.name}; {again}")
    return Scores(folder, metric, lines, summary)


def read_summary(path: Path, remedy: str) -> dict:
    """A summary, whose values have the types of those that summarise writes; else ScoresError."""
    content = read_file(path)
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise ScoresError(f"{path}: not a summary of scores ({str(error)[:100]}); {remedy}") from None
    summary = manifest.checked(values, SUMMARY, str(path), remedy)
    interval, bootstrap = summary["interval"], summary.get("bootstrap", {"resamples": 0, "seed": 0})
    pair = interval is None or (len(interval) == 2 and all(map(is_finite, interval)))
    made = isinstance(bootstrap, dict) and bootstrap.keys() >= {"resamples", "seed"}
    if not (pair and made and isinstance(summary.get("method"), str | None)):
        raise ScoresError(f"{path}: interval, method or bootstrap are not those of scores; {remedy}")
    manifest.checked(summary["images"], {}, f"{path}, images", remedy)
    return summary


def is_finite(value: object) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and isfinite(value)
