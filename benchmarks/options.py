"""Lists on the command line."""

from solvers import UserError


def numbers(option: str, text: str) -> list[int]:
    """Numbers from 1 to 1000 in a comma-separated list, such as serial depths."""
    try:
        values = sorted({int(d) for d in text.split(",")})
    except ValueError:
        values = []
    if not values or not all(1 <= d <= 1000 for d in values):
        raise UserError(f"{option} {text!r}: expected numbers from 1 to 1000 such as 4,6,8,10")
    return values


def names(option: str, text: str, valid: list[str]) -> list[str]:
    """Names in a comma-separated list."""
    chosen = valid if text == "all" else text.split(",")
    if wrong := [name for name in chosen if name not in valid]:
        raise UserError(f"{option} {wrong[0]!r}: expected some of {','.join(valid)}")
    return chosen
