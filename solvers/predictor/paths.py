"""Which predictor file a user means: a file, a folder as runs and downloads have them, a name or a number
under exps.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .safe_pickle import PredictorError

KINDS = ("best", "distilled", "start")  # of the tables of one backbone, the most learned first
BEST_EXPORTS = ("export/network-snapshot-export-best.pkl", "network-snapshot-export-best.pkl")
NUMBERED_EXPORTS = (
    "export/network-snapshot-export-*.pkl",
    "network-snapshot-export-*.pkl",
    "network-snapshot-*.pkl",
)
MOVED = {  # folders of an earlier layout of exps, each of one table
    r"digits-distilled/(?P<name>[^/]+)": r"digits/grid/\g<name>.pkl",
    "digits-rdpo/epd-g7.5-d4": "digits/best.pkl",
    "digits-sd3-distilled/epd-g4.5-d4": "digits-sd3/distilled.pkl",
    "digits-flux-distilled/epd-g3.5-d4": "digits-flux/distilled.pkl",
}


def resolve_predictor_path(text: str, exps: str | Path = "exps", kinds: Sequence[str] = KINDS) -> Path:
    """The predictor file meant by a file with or without its .pkl, a folder, either of them under `exps`, or
    the number of a folder there.

    In a folder: the best export of a run, else its table of the first of `kinds` (best, then distilled, then
    start) that is there as KIND.pkl or NAME-KIND.pkl, where the newest export goes before a start table; else
    the only .pkl file that it holds.
    """
    places = [Path(text)] if Path(text).is_absolute() else [Path(text), Path(exps) / text]
    for place in places:
        if os.path.isfile(place):
            return place
        if os.path.isdir(place):
            return _in_folder(place, kinds)
    for place in places:
        for candidate in _other_names(place):
            if os.path.isfile(candidate):
                return candidate
    if text.isdecimal() and Path(exps).is_dir():
        runs = sorted(p for p in Path(exps).iterdir() if p.is_dir() and p.name.split("-")[0].isdecimal())
        runs = [p for p in runs if int(p.name.split("-")[0]) == int(text)]
        if runs:
            return _in_folder(runs[-1], kinds)
    tried = ", ".join(map(str, places)) + (f", folders {Path(exps) / text}-*" if text.isdecimal() else "")
    beside = sorted(q.name for p in places if p.suffix == ".pkl" for q in p.parent.glob("*.pkl"))
    near = f"; there are {', '.join(beside[:8])}" if beside else ""
    remedy = f"give a .pkl file, a run folder or a name under {exps}"
    raise PredictorError(f"predictor {text!r} not found (looked for {tried}{near}); {remedy}")


def tables_in(folder: Path, kinds: Sequence[str] = KINDS) -> dict[str, Path]:
    """The tables of a backbone's folder by kind: KIND.pkl or NAME-KIND.pkl; several of one kind:
    PredictorError.
    """
    tables = {}
    for kind in kinds:
        files = sorted(
            p for p in folder.glob("*.pkl") if p.name == f"{kind}.pkl" or p.name.endswith(f"-{kind}.pkl")
        )
        files = [p for p in files if not p.name.startswith("network-snapshot")]
        # a download beside ours goes first
        own = [p for p in files if p.name == f"{folder.absolute().name}-{kind}.pkl"] or files
        if len(own) > 1:
            raise PredictorError(
                f"{folder} holds several {kind} tables: {', '.join(p.name for p in own)}; name one of them"
            )
        if own:
            tables[kind] = own[0]
    return tables


def _other_names(place: Path) -> list[Path]:
    """What else may be meant by a path where nothing is: the file without its .pkl, the published name of a
    table that has a shorter one here, a folder of an earlier layout.
    """
    if not place.name:
        return []
    names = [place.with_name(f"{place.name}.pkl")]
    if kind := re.search(r"-(best|distilled|start)\.pkl$", place.name):
        names.append(place.with_name(f"{kind[1]}.pkl"))  # sd15/sd15-start.pkl, as published
    for old, new in MOVED.items():
        path = rf"(^|/){old}(/network-snapshot-export-best\.pkl)?$"
        if re.search(path, place.as_posix()):
            names.append(Path(re.sub(path, rf"\1{new}", place.as_posix())))
    return names


def _in_folder(folder: Path, kinds: Sequence[str]) -> Path:
    for name in BEST_EXPORTS:
        if (folder / name).is_file():
            return folder / name
    tables, newest = tables_in(folder, kinds), _newest_export(folder)
    if newest is not None and set(tables) <= {"start"}:
        return newest
    if tables:
        return next(iter(tables.values()))
    files = sorted(folder.glob("*.pkl"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise PredictorError(f"{folder} holds no predictor (.pkl)")
    names = ", ".join(p.name for p in files[:8]) + (", ..." if len(files) > 8 else "")
    raise PredictorError(
        f"{folder} holds several predictors ({len(files)}): {names}; name one of them, such as"
        f" {folder / files[0].stem}"
    )


def _newest_export(folder: Path) -> Path | None:
    """The export with the highest number at the end of its name."""
    for pattern in NUMBERED_EXPORTS:
        numbered = [
            (int(m[1]), p.name, p) for p in folder.glob(pattern) if (m := re.search(r"(\d+)\.pkl$", p.name))
        ]
        if numbered:
            return max(numbered)[2]
    return None
