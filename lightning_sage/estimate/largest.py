"""The largest size that fits, found by asking for few sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

# of a need, how far the curve through others may be from it
EXACT = 1e-3


def largest_each(
    needs: Callable[[int], Mapping[str, int]], room: int, start: int, most: int
) -> dict[str, int]:
    """:func:`largest` of several needs that are asked together.

    Where curves through three sizes foretell the need of a fourth, the largest of all that fit,
    they are taken at their word for every name.

    Args:
        needs: By name, bytes of a size.
        room: As there.
        start: As there.
        most: As there.
    """
    # a batch of one is a case of its own for what is broadcast
    first = max(start, 2)
    near = (first, 2 * first, 4 * first, 3 * first, first // 2, 1)
    sizes = list(dict.fromkeys(size for size in near if 1 <= size <= most))[:3]
    asked = {size: needs(size) for size in sizes}
    names = list(asked[sizes[0]])
    curves = {name: {size: found[name] for size, found in asked.items()} for name in names}
    if len(sizes) == 3 and room >= 0:
        guesses = [_last_below(curve, room, 0, most + 1) for curve in curves.values()]
        farthest = max(*guesses, 1)
        if all(
            abs(_through(curves[n], farthest) - x) <= EXACT * x for n, x in needs(farthest).items()
        ):
            if farthest not in asked:
                for name, x in needs(farthest).items():
                    curves[name][farthest] = x
            return {n: _last_below(curve, room, 0, most + 1) for n, curve in curves.items()}
    return {name: largest(partial(_one, needs, name), room, start, most) for name in names}


def _one(needs: Callable[[int], Mapping[str, int]], name: str, size: int) -> int:
    return needs(size)[name]


def largest(need: Callable[[int], int], room: int, start: int, most: int) -> int:
    """The largest size in ``[1, most]`` whose need fits; 0 where none does.

    Needs that grow linearly or by squares are met in a few steps; the size found was asked itself.

    Args:
        need: Bytes of a size; never falls.
        room: Bytes there are.
        start: A size to begin with.
        most: The largest size of all.
    """
    if room < 0:
        return 0
    fits, fails = 0, most + 1
    points: dict[int, int] = {}
    guess = min(start, most)
    while fails - fits > 1:
        expected = _through(points, guess) if len(points) > 2 else None
        points[guess] = need(guess)
        if points[guess] <= room:
            fits = guess
        else:
            fails = guess
        # the curve that led here was right, and says that the next size is too large
        right = expected is not None and abs(expected - points[guess]) <= EXACT * points[guess]
        following = _last_below(points, room, fits, fails)
        if right and following == fits and fits > 0:
            break
        guess = min(max(following, fits + 1), fails - 1)
    return fits


def _last_below(points: Mapping[int, int], room: int, fits: int, fails: int) -> int:
    """Where the curve through the latest points leaves the room, between two sizes."""
    low, high = fits, fails
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _through(points, middle) <= room else (low, middle)
    return low


def _through(points: Mapping[int, int], x: int) -> Fraction:
    """The polynomial through the latest three points, at x; proportional through one."""
    latest = list(points.items())[-3:]
    if len(latest) == 1:
        return Fraction(latest[0][1] * x, latest[0][0])
    total = Fraction(0)
    for a, y in latest:
        term = Fraction(y)
        for b, _ in latest:
            if b != a:
                term *= Fraction(x - b, a - b)
        total += term
    return total
