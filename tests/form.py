"""Figures of the form of the code, and what is over its limits: python tests/form.py [FOLDER ...]."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE, MAX_FUNCTION, MAX_P90, MAX_PARAMETERS = 300, 60, 25, 5
BANNED = re.compile(
    r"(^|_)(told|tells?|telling|found|mine|theirs|exams?|agree[ds]?|settled?|settles|decide[ds]?|produce[ds]?)(_|$)",
    re.IGNORECASE,
)
ECOSYSTEM = {  # signatures that others call, and whose they are
    ("solvers/solver.py", "sample"): "a k-diffusion sampler's, with finish",
    ("integrations/k_diffusion/sample_epd.py", "sample_epd"): "a k-diffusion sampler's",
    ("integrations/k_diffusion/sample_epd.py", "_denoise"): "what a k-diffusion sampler passes on",
    ("integrations/comfyui/sample_epd.py", "sample_epd"): "a k-diffusion sampler's",
    ("integrations/comfyui/sample_epd.py", "_denoise"): "what a k-diffusion sampler passes on",
    ("integrations/comfyui/sampling.py", "sample"): "a ComfyUI sampler function's",
    ("integrations/diffusers/epd_scheduler.py", "__init__"): "a diffusers scheduler's configuration",
    ("integrations/diffusers/epd_scheduler.py", "step"): "a diffusers scheduler's",
    ("integrations/diffusers/epd_scheduler.py", "set_timesteps"): "a diffusers scheduler's",
}
LONG_FILES = {  # a file that may be longer, and why
    "integrations/diffusers/epd_scheduler.py": "copied as one file into a scheduler's folder",
}
DefinitionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function, and where it stands."""

    file: str
    line: int
    name: str
    lines: int
    parameters: int
    command: bool
    """Whether a command line passes its arguments."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}"


def files(folders: list[str]) -> list[Path]:
    """The modules of the project, but for its tests, below some folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    chosen = [f for f in listed if not f.startswith("tests/") and (ROOT / f).is_file()]
    return [ROOT / f for f in sorted(set(chosen)) if not folders or f.startswith(tuple(folders))]


def is_command(function: DefinitionNode) -> bool:
    """Whether click passes the arguments: a decorator of click's, or of ours that stands for one."""
    decorators = [ast.unparse(d) for d in function.decorator_list]
    return any(re.match(r"click\.|\w+\.command|switch|choice|sampling_options", d) for d in decorators)


def functions(path: Path) -> Iterator[Function]:
    """The functions of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, DefinitionNode):
            a = node.args
            named = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            file = path.relative_to(ROOT).as_posix()
            yield Function(file, node.lineno, node.name, lines, len(named), is_command(node))


def banned(path: Path) -> Iterator[str]:
    """The names in a file that hold a word with a better one in the field."""
    with tokenize.open(path) as file:
        text = file.read()
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        file_tell = before == "." and token.string == "tell"  # a method of files, and of the library cma
        if token.type == tokenize.NAME and BANNED.search(token.string) and not file_tell:
            yield f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}"
        before = token.string


def over_limits(paths: list[Path]) -> dict[str, list[str]]:
    """What is over a limit, by limit."""
    every = [function for path in paths for function in functions(path)]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    own = [f for f in every if not f.command and (f.file, f.name) not in ECOSYSTEM]
    return {
        f"files over {MAX_FILE} lines": [
            f"{name}: {n}" for name, n in lengths.items() if n > MAX_FILE and name not in LONG_FILES
        ],
        f"functions over {MAX_FUNCTION} lines": [f"{f}: {f.lines}" for f in every if f.lines > MAX_FUNCTION],
        f"functions over {MAX_PARAMETERS} parameters": [
            f"{f}: {f.parameters}" for f in own if f.parameters > MAX_PARAMETERS
        ],
        "banned words in names": [name for path in paths for name in banned(path)],
    }


def quantile(values: list[int], q: float) -> int:
    """A quantile of sorted values."""
    return values[min(int(len(values) * q), len(values) - 1)]


def function_lines(paths: list[Path]) -> list[int]:
    """The lengths of all functions, the shortest first."""
    return sorted(function.lines for path in paths for function in functions(path))


def main(folders: list[str]) -> None:
    """Print the figures; exit status 1 where something is over a limit."""
    paths = files(folders)
    lines = function_lines(paths)
    p90 = quantile(lines, 0.9)
    print(f"{len(paths)} files, {len(lines)} functions")
    print(f"lines of a function: median {quantile(lines, 0.5)}, p90 {p90}, longest {lines[-1]}")
    over = over_limits(paths)
    for limit, places in over.items():
        print(f"{limit}: {len(places)}", *places, sep="\n  ")
    sys.exit(1 if any(over.values()) or p90 > MAX_P90 else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
