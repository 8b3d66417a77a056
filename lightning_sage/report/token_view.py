"""A sample's text as HTML: tokens shaded by how many blocks kept them, a row for each block."""

from __future__ import annotations

import base64
import json
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from html import escape

from lightning_sage.report.block_names import short_names
from lightning_sage.watch.history import Line

SHADES = 10
# what one page holds: samples, tokens of a sample, and cells (tokens x blocks) of all samples
SAMPLES, TOKENS, CELLS = 6, 16_384, 3_000_000
# neither kept nor replayed, kept, replayed too; mid-tones that show on white and on black
_PALETTE = (0x00000000, 0x2F7FC4FF, 0xD9741AFF, 0x88888866)


def token_view(lines: Sequence[Line], blocks: Sequence[str]) -> tuple[str, str]:
    """The samples as HTML that reads without scripts, and a line on what it leaves out.

    Args:
        lines: Lines of kind `tokens`, at least one.
        blocks: Names of the blocks.
    """
    chosen = _spread(lines, _samples(lines, len(blocks)))
    left_out = []
    if len(chosen) < len(lines):
        left_out.append(f"{len(chosen)} of {len(lines)} samples are shown, spread over the run.")
    longest = max(len(line["text"]) for line in chosen)
    if longest > TOKENS:
        left_out.append(f"Of {longest:,} tokens the last {TOKENS:,} are shown.")
    inputs, parts = [], []
    for index, line in enumerate(chosen):
        last = index == len(chosen) - 1
        inputs.append(
            f'<input type="radio" name="sample" id="sample-{index}"{" checked" * last}>'
            f'<label for="sample-{index}">step {line["step"]:,}</label>'
        )
        parts.append(_sample({**line, **_ends(line)}, blocks))
    choice = f'<div class="choice" role="group" aria-label="Sample">{"".join(inputs)}</div>'
    return f'<div class="tokens">{choice}{"".join(parts)}</div>', " ".join(left_out)


def _samples(lines: Sequence[Line], blocks: int) -> int:
    longest = max(min(len(line["text"]), TOKENS) for line in lines)
    return max(1, min(SAMPLES, CELLS // max(1, longest * blocks)))


def _spread(lines: Sequence[Line], most: int) -> list[Line]:
    """The last, the first, and what lies evenly between."""
    if len(lines) <= most:
        return list(lines)
    if most == 1:
        return [lines[-1]]
    return [lines[round(index * (len(lines) - 1) / (most - 1))] for index in range(most)]


def _ends(line: Line) -> Line:
    """The last tokens, those that bear loss where only an answer does."""
    count = len(line["text"])
    whole: Line = {
        "text": line["text"],
        "labels": line.get("labels") or "0" * count,
        "valid": line.get("valid") or "1" * count,
    }
    cut = {name: value[-TOKENS:] for name, value in whole.items()}
    return {**cut, **{key: [row[-TOKENS:] for row in line[key]] for key in ("kept", "replayed")}}


def _sample(line: Line, blocks: Sequence[str]) -> str:
    valid, labels, kept, replayed = line["valid"], line["labels"], line["kept"], line["replayed"]
    counts = _counts(kept, len(valid))
    real = valid.count("1")
    share = sum(counts) / max(1, real * len(blocks))
    words = (
        f"{real:,} tokens, {valid.count('0'):,} of padding, {labels.count('1'):,} that bear loss. "
        f"On average a block keeps {share:.1%} of the tokens."
    )
    data = {
        "blocks": list(blocks),
        "kept": [_packed(row) for row in kept],
        "replayed": [_packed(row) for row in replayed],
    }
    # inside a script element only these could end it
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    text = "".join(_spans(line["text"], valid, labels, counts, len(blocks)))
    return (
        f'<section class="sample" aria-label="Sample of step {line["step"]:,}">'
        f'<p class="words">{words}</p>'
        '<p class="shading" hidden><label>Shade by <select></select></label>'
        ' <output aria-live="polite"></output></p>'
        f'<div class="text" dir="auto">{text}</div>'
        f"<details><summary>One row for each block</summary>{_rows(line, blocks)}</details>"
        f'<script type="application/json">{script}</script></section>'
    )


def _counts(rows: Sequence[str], tokens: int) -> list[int]:
    counts = [0] * tokens
    for row in rows:
        for index, bit in enumerate(row):
            counts[index] += bit == "1"
    return counts


def _spans(
    text: Sequence[str], valid: str, labels: str, counts: Sequence[int], blocks: int
) -> Iterator[str]:
    index = 0
    while index < len(text):
        if valid[index] == "0":
            end = valid.find("1", index)
            count = (len(text) if end < 0 else end) - index
            yield f'<span class="pad" data-n="{count}">{count:,} of padding</span>'
            index += count
            continue
        # a token that one block of a hundred kept is not one that none did
        shade = -(-SHADES * counts[index] // blocks)
        mark = " l" if labels[index] == "1" else ""
        yield f'<span class="k{shade}{mark}">{shown(text[index])}</span>'
        index += 1


def shown(token: str) -> str:
    """The token as HTML: what would be invisible gets a sign, and keeps its effect on the lines."""
    if not token:
        return _sign("∅")
    # one space before a word shows by the shading
    blank = not token.strip(" ") or "  " in token
    parts = []
    for index, character in enumerate(token):
        match character:
            case "\n":
                parts.append(_sign("↵") + "\n")
            case "\t":
                parts.append(_sign("→") + "\t")
            case " ":
                parts.append(_sign("·") if blank else " ")
            case _ if ord(character) < 32:
                parts.append(_sign(chr(0x2400 + ord(character))))
            # no letters: formatting, surrogates, private and unassigned ones, odd separators
            case _ if unicodedata.category(character)[0] == "C" or (
                unicodedata.category(character)[0] == "Z"
            ):
                parts.append(_sign(f"U+{ord(character):04X}"))
            case _ if not index and unicodedata.combining(character):
                parts.append("◌" + character)
            case _:
                parts.append(escape(character))
    return "".join(parts)


def _sign(text: str) -> str:
    return f"<i>{text}</i>"


def _rows(line: Line, blocks: Sequence[str]) -> str:
    names, _ = short_names(blocks)
    real = max(1, line["valid"].count("1"))
    rows = []
    for name, short, kept, replayed in zip(
        blocks, names, line["kept"], line["replayed"], strict=True
    ):
        said = f"{kept.count('1') / real:.1%} kept, {replayed.count('1') / real:.1%} replayed"
        rows.append(
            f'<tr><th scope="row" title="{escape(name)}">{escape(short)}</th>'
            f'<td><img alt="{said}" src="{_strip(kept, replayed, line["valid"])}"></td>'
            f"<td>{kept.count('1'):,}</td><td>{replayed.count('1'):,}</td></tr>"
        )
    head = (
        '<tr><th scope="col">block</th><th scope="col">first to last token; grey is padding</th>'
        '<th scope="col">kept</th><th scope="col">replayed</th></tr>'
    )
    return f'<table class="rows"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _strip(kept: str, replayed: str, valid: str) -> str:
    """A PNG one pixel high and one a token wide, as a data URL."""
    pixels = [
        3 if v == "0" else 2 if r == "1" else int(k)
        for k, r, v in zip(kept, replayed, valid, strict=True)
    ]
    pixels += [0] * (-len(pixels) % 4)
    quads = zip(*[iter(pixels)] * 4, strict=True)
    row = bytes([0, *(a << 6 | b << 4 | c << 2 | d for a, b, c, d in quads)])
    colours = b"".join(struct.pack(">I", colour)[:3] for colour in _PALETTE)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(name, data)
        for name, data in (
            # two bits a pixel, with a palette
            (b"IHDR", struct.pack(">IIBBBBB", len(valid), 1, 2, 3, 0, 0, 0)),
            (b"PLTE", colours),
            (b"tRNS", bytes(colour & 255 for colour in _PALETTE)),
            (b"IDAT", zlib.compress(row, 9)),
            (b"IEND", b""),
        )
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _packed(row: str) -> str:
    """Eight tokens a byte, the first in the highest bit."""
    padded = row + "0" * (-len(row) % 8)
    return base64.b64encode(int(f"1{padded}", 2).to_bytes(len(padded) // 8 + 1, "big")[1:]).decode()
