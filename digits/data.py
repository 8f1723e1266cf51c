"""Real handwritten digits (UCI optical digits, bundled with scikit-learn) painted in ink, with captions."""

import re
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "black": (0.08, 0.08, 0.10),
    "red": (0.85, 0.10, 0.12),
    "green": (0.05, 0.55, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "orange": (0.98, 0.55, 0.05),
    "purple": (0.55, 0.15, 0.65),
}
WEIGHTS = {"thin": 0.64, "plain": 0.48, "bold": 0.35}  # ink threshold of the grey level: lower is thicker
TEMPLATES = (
    "a {weight} {colour} handwritten {digit}",
    "a {weight} handwritten {digit} in {colour} ink",
    "the digit {digit} in {colour}, {weight}",
    "a {colour} {weight} {digit}",
    "{weight} {colour} number {digit}",
)


@dataclass(frozen=True)
class Label:
    """What a prompt asks for; an index of DIGITS, COLOURS, WEIGHTS, or -1 where the prompt leaves it open."""

    digit: int
    colour: int = -1
    weight: int = -1


ALL_LABELS = tuple(Label(*c) for c in product(range(10), range(len(COLOURS)), range(len(WEIGHTS))))
# One combination in ten is never trained on: every digit twice less one weight each, every colour three
# times.
HELD_OUT_LABELS = frozenset(c for c in ALL_LABELS if (3 * c.digit + c.colour + 4 * c.weight) % 10 == 0)


def load_scans(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8x8 scans [n, 8, 8] in [0, 1] and their digits [n]; `split` is "train" (4 of 5, stratified) or
    "test".
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    parts = train_test_split(raw.images, raw.target, test_size=0.2, stratify=raw.target, random_state=0)
    scans, digits = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return torch.from_numpy(scans).float() / 16, torch.from_numpy(digits)


def augment(scans: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Slightly turned, scaled and moved copies of grey images [n, H, W] (up to 6 degrees, 5 %, 3 % of the
    width).
    """
    n = len(scans)
    angle, scale, dx, dy = (torch.rand(4, n, generator=generator) * 2 - 1) * torch.tensor(
        [[0.105], [0.05], [0.06], [0.06]]
    )
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
    grid = F.affine_grid(affine, [n, 1, *scans.shape[1:]], align_corners=False)
    return F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)


def enlarge(scans: torch.Tensor) -> torch.Tensor:
    """Grey 8x8 scans [n, 8, 8] as 32x32 [n, 32, 32]: bicubic to 26x26 with a margin of 3."""
    inner = SIZE - 6
    large = F.interpolate(scans[:, None], (inner, inner), mode="bicubic", align_corners=False)[:, 0].clamp(
        0, 1
    )
    return F.pad(large, (3, 3, 3, 3))


def paint(grey: torch.Tensor, colour: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Ink drawings [n, 3, 32, 32] in [0, 1] on white paper of grey levels [n, 32, 32], with colour and weight
    indices [n].
    """
    threshold = torch.tensor(list(WEIGHTS.values()))[weight].view(-1, 1, 1)
    ink = torch.sigmoid(16 * (grey - threshold))[:, None]
    pigment = torch.tensor(list(COLOURS.values()))[colour].view(-1, 3, 1, 1)
    return 1 - ink * (1 - pigment)


def caption(label: Label, template: str = TEMPLATES[0], numeral: bool = False) -> str:
    """The caption of a label; parts that the label leaves open are left out."""
    words = {
        "digit": str(label.digit) if numeral else DIGITS[label.digit],
        "colour": list(COLOURS)[label.colour] if label.colour >= 0 else "",
        "weight": list(WEIGHTS)[label.weight] if label.weight >= 0 else "",
    }
    if not words["colour"]:
        template = template.replace(" in {colour} ink", "").replace(" in {colour}", "")
    if not words["weight"]:
        template = template.replace(", {weight}", "")
    return " ".join(template.format(**words).split())


def parse(prompt: str) -> Label | None:
    """The label that a prompt asks for, or None when it names no digit."""
    words = re.findall(r"\w+", prompt.lower())
    digit = next(
        (DIGITS.index(w) if w in DIGITS else int(w) for w in words if w in (*DIGITS, *"0123456789")), None
    )
    if digit is None:
        return None
    colour = next((list(COLOURS).index(w) for w in words if w in COLOURS), -1)
    weight = next((list(WEIGHTS).index(w) for w in words if w in WEIGHTS), -1)
    return Label(digit, colour, weight)


def fits(label: Label, asked: Label) -> bool:
    """Whether a drawing of `label` is what a prompt asks for."""
    return (
        label.digit == asked.digit
        and asked.colour in (-1, label.colour)
        and asked.weight in (-1, label.weight)
    )


def random_caption(label: Label, generator: torch.Generator) -> str:
    """A training caption: random template, word or numeral, colour named in 80 % and weight in 60 %
    of them.
    """
    u = torch.rand(4, generator=generator).tolist()
    seen = Label(label.digit, label.colour if u[0] < 0.8 else -1, label.weight if u[1] < 0.6 else -1)
    return caption(seen, TEMPLATES[int(u[2] * len(TEMPLATES))], numeral=u[3] < 0.3)


def evaluation_prompts(n: int, labels=ALL_LABELS) -> list[str]:
    """n prompts that name digit, colour and weight, going round the labels in a fixed mixed order."""
    labels = sorted(labels, key=lambda c: (c.digit, c.colour, c.weight))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    return [caption(labels[order[i % len(order)]], TEMPLATES[i % len(TEMPLATES)]) for i in range(n)]


def training_prompts(n: int) -> list[str]:
    """n prompts of the combinations that the backbone was trained on, none of them an evaluation prompt."""
    labels = [c for c in ALL_LABELS if c not in HELD_OUT_LABELS]
    kept_apart = set(evaluation_prompts(len(ALL_LABELS)))
    choices = [p for t in TEMPLATES for c in labels if (p := caption(c, t)) not in kept_apart]
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(1)).tolist()
    return [choices[order[i % len(order)]] for i in range(n)]
