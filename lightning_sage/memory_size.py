"""Sizes of memory, as people write them."""

from __future__ import annotations

import math
import re

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


def parse_size(text: str | int | float) -> int:
    """Bytes of a size.

    Args:
        text: A number of bytes, or a number and a unit: `KiB`, `MiB`, `GiB`, `TiB` are powers of
            1024, `kB`, `MB`, `GB`, `TB` of 1000, in any case; the `B` may be left out.

    Returns:
        Whole bytes, at least 1.

    Raises:
        ValueError: It is no size.

    Example:
        >>> parse_size("512 MiB"), parse_size("80GB"), parse_size(1e6)
        (536870912, 80000000000, 1000000)
    """
    number = isinstance(text, int | float) and not isinstance(text, bool)
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    size = float(text) if number else 0.0
    if found is not None:
        value, power, binary, _ = found.groups()
        # a lone "i" is the end of no unit
        if power or not binary:
            size = float(value) * (1024 if binary else 1000) ** _POWERS[power.lower()]
    if not math.isfinite(size) or size < 1:
        raise ValueError(
            f"{text!r} is no size of memory: give a number of bytes, or a number and a unit, such "
            "as '20GiB', '80GB' or '512 MiB'"
        )
    return int(size)
