"""The report: found, written, self-contained, and right in a browser, light and dark."""

import builtins
import os
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import browser
from histories import MIB, SUMMARY, made, sample, start
from lightning_sage.report.block_names import block_ticks
from lightning_sage.report.command import main
from lightning_sage.report.page import page
from lightning_sage.report.plots import Curve, curves
from lightning_sage.report.token_view import shown, token_view
from lightning_sage.watch.history import NAME, History, read

pytest.importorskip("matplotlib")

WORDS = [" <script>alert(1)</script>", "&amp;", "</script>", "\n", "  ", "\t", "\x00", "\u202e", ""]
VOID = {"meta", "link", "input", "img"}


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser.seen


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of a whole run, a killed one, one of many blocks, and one with hostile words in it."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "whole": made(folder / "whole"),
        "killed": made(folder / "killed", blocks=2, lines=1, samples=0, whole=False),
        "many": made(folder / "many", blocks=100, lines=60, tokens=700),
    }
    names = ["encoder.block.0.<b>very_long_name</b>", "decoder.block.0.&cross", "lonely"]
    path = made(folder / "hostile", names=names, samples=0)
    history = History(path)
    start(history, names, model="</title><script>alert(1)</script>", device='"><img src=x>')
    step = {name: [0.5, None, 0.5] for name in ("kept", "replayed", "cached")}
    history.write("step", step=1, seconds=None, **step)
    history.write("event", step=1, text="<img src=http://a.example/b.png>")
    sample(history, 1, names, WORDS, "111111110")
    runs["hostile"] = path
    for path in runs.values():
        main([str(path.parent)])
    return {name: path.with_name("report.html") for name, path in runs.items()}


@pytest.mark.parametrize("name", ["whole", "killed", "many", "hostile"])
def test_a_page_needs_nothing_but_itself(pages, name):
    html = pages[name].read_text()
    seen = parsed(html)
    assert html.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in seen
    assert re.search(r"<title>[^<]+</title>", html)
    for tag, attributes in seen:
        for key in {"src", "href", "xlink:href"} & set(attributes):
            assert attributes[key].startswith(("data:", "#"))
        assert tag != "img" or attributes["alt"]
        assert tag != "svg" or attributes["aria-label"]
    outside = html.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    if name != "hostile":
        assert "//" not in re.sub(r'<script.*?</script>|src="data:[^"]*"', "", outside, flags=re.S)
    ids = [attributes["id"] for _, attributes in seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', html)
    assert set(used) <= set(ids)


def test_a_page_says_the_numbers_of_its_records(pages):
    html = pages["whole"].read_text()
    for number in ("54.3%", "5.69 MiB", "162.7 MiB", "0.123"):
        assert f"<dd>{number}</dd>" in html
    (run,) = read(pages["whole"].with_name(NAME))
    kept = [sum(line["kept"][block] for line in run.steps) / 12 for block in range(4)]
    cached = [sum(line["cached"][block] for line in run.steps) / 12 / 2**20 for block in range(4)]
    for block in range(4):
        row = re.search(rf'<th scope="row">model.layers.{block}</th>(.*?)</tr>', html)[1]
        cells = re.findall("<td>(.*?)</td>", row)
        assert cells[:3] == ["90.00", f"{cached[block]:.3f}", f"{kept[block]:.1%}"]
        assert cells[4] == f"{run.fidelity[-1]['blocks'][run.blocks[block]][0]:.3f}"
    assert f"SAGE keeps {sum(cached):,.1f} MiB a step in 4 blocks" in html
    assert "where a dense step saves 360.0 MiB" in html
    assert "Median of a step: 0.125 s" in html
    assert "1 of 12 beyond the axis, up to 2.5 s" in html
    assert "forward 800.0, backward 900.0" in html
    assert "memory budget: keep=0.25, int8 fits" in html
    assert "Left out" not in html
    assert "has not ended" not in html


def test_a_page_says_what_is_missing(pages):
    html = pages["killed"].read_text()
    assert "history stops after step 10" in html
    for words in ("fidelity", "dense step", "peak memory", "loss", "tokens of a sample"):
        assert words in html[html.index("Left out") :]
    assert "Gradient fidelity" not in html
    # of the steps there are
    assert "<dt>seconds a step (median)</dt><dd>2.5</dd>" in html


def test_a_block_without_a_number_has_an_empty_cell(tmp_path):
    history = History(tmp_path / NAME)
    start(history, ["layers.0", "layers.1"])
    history.write(
        "step", step=1, steps=1, seconds=0.1, kept=[None, 0.5], replayed=[None, 0.25],
        cached=[None, MIB],
    )  # fmt: skip
    [run] = read(tmp_path / NAME)
    text = page(run)
    assert "<td></td><td></td><td></td>" in text
    assert "<td>1.000</td><td>50.0%</td><td>25.0%</td>" in text


def test_a_run_without_a_step_has_a_page(tmp_path):
    start(History(tmp_path / NAME), ["block"])
    (run,) = read(tmp_path / NAME)
    html = page(run)
    parsed(html)
    assert "No step was recorded" in html


def test_words_of_a_run_are_words(pages):
    html = pages["hostile"].read_text()
    scripts = re.findall(r"<script", html)
    # the data of one sample, and the page's own
    assert len(scripts) == 2
    assert "<img src=x" not in html
    assert "<img src=http" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&amp;amp;" in html


@pytest.mark.parametrize(
    ("token", "html"),
    [
        (" word", " word"),
        (" ", "<i>·</i>"),
        ("\n\n", "<i>↵</i>\n<i>↵</i>\n"),
        ("a\tb", "a<i>→</i>\tb"),
        ("if  x", "if<i>·</i><i>·</i>x"),
        ("\x1b", "<i>␛</i>"),
        ("\x85\u200b\u00a0", "<i>U+0085</i><i>U+200B</i><i>U+00A0</i>"),
        ("\u0301a", "◌\u0301a"),
        ("", "<i>∅</i>"),
        ("<&>", "&lt;&amp;&gt;"),
        ("日本", "日本"),
    ],
)
def test_what_is_invisible_in_a_token_is_shown(token, html):
    assert shown(token) == html


def test_tokens_are_shaded_by_the_blocks_that_kept_them():
    line = {"step": 1, "text": ["a", "b", "c", "d", "e"], "valid": "11101", "labels": "01000"}
    line |= {"kept": ["11000", "11001", "10000"], "replayed": ["00000"] * 3}
    html, left_out = token_view([line], ["x", "y", "z"])
    spans = re.findall(r'<span class="(.*?)"', html)
    # all three, two of three, none, padding, one
    assert spans == ["k10", "k7 l", "k0", "pad", "k4"]
    assert "On average a block keeps 50.0% of the tokens" in html
    assert not left_out


def test_a_page_stays_small():
    def line(step, tokens):
        row = "0110" * (tokens // 4)
        return {"step": step, "text": ["word"] * tokens, "kept": [row] * 80, "replayed": [row] * 80}

    html, left_out = token_view([line(step, 2048) for step in range(40)], ["b"] * 80)
    assert "6 of 40 samples" in left_out
    assert "step 0<" in html
    assert "step 39<" in html
    html, left_out = token_view([line(step, 40_000) for step in range(3)], ["b"] * 80)
    assert "2 of 3 samples" in left_out
    assert "Of 40,000 tokens the last 16,384" in left_out
    assert len(html) < 5e6


def test_labels_of_an_axis_are_whole():
    svg = curves("narrow", [Curve("loss", "keep", [1, 2], [4.571, 4.579])], "loss", bottom=None)
    labels = re.findall(r">([\d.]+)</text>", svg)
    heights = [float(label) for label in labels if "." in label]
    steps = [b - a for a, b in pairwise(heights)]
    assert len(heights) > 3
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert steps[0] > 0


def test_blocks_are_named_by_what_tells_them_apart():
    ticks = block_ticks([f"model.layers.{i}.block" for i in range(80)])
    assert ticks.title == "block (model.layers.*.block)"
    assert ticks.labels == ["0", "10", "20", "30", "40", "50", "60", "70"]
    assert block_ticks(["a.0", "a.1"]).labels == ["0", "1"]
    assert block_ticks(["only.one"]).labels == ["one"]
    assert block_ticks(["encoder.layer.0", "decoder.layer.0"]).labels == ["encoder", "decoder"]
    long = block_ticks(["encoder.first_block", "decoder.second_block"])
    assert (long.labels, long.title) == (["0", "1"], "block, counted in order")


def test_the_newest_history_below_a_folder_is_taken(tmp_path, capsys):
    for index, version in enumerate(("version_1", "version_0")):
        path = made(tmp_path / "logs" / version, lines=2)
        os.utime(path, (index, index))
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "version_0" in printed
    assert "the newest of 2 below" in printed
    assert (tmp_path / "logs" / "version_0" / "report.html").exists()
    main([str(path.parent.with_name("version_1")), "--out", str(tmp_path / "new" / "a.html")])
    assert (tmp_path / "new" / "a.html").exists()
    main([str(path), "--out", str(tmp_path)])
    assert (tmp_path / "report.html").exists()


def test_one_of_several_fits_is_chosen(tmp_path, capsys):
    path = made(tmp_path, lines=2)
    history = History(path)
    start(history, ["b"], model="Second")
    main([str(tmp_path), "--run", "1"])
    assert "run 1 of 2" in capsys.readouterr().out
    assert "<h1>LlamaForCausalLM" in (tmp_path / "report.html").read_text()
    main([str(tmp_path)])
    assert "<h1>Second" in (tmp_path / "report.html").read_text()


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_reported_is_said(tmp_path, capsys, monkeypatch):
    said = refused(capsys, tmp_path)
    assert f"no {NAME} in or below {tmp_path}" in said
    assert "SageCallback" in said
    assert "logger" in said
    assert "no folder" in refused(capsys, tmp_path / "nowhere")
    path = made(tmp_path, lines=2)
    assert "1 to 1" in refused(capsys, tmp_path, "--run", "2")
    assert "1 to 1" in refused(capsys, tmp_path, "--run", "0")
    assert "cannot be written" in refused(capsys, tmp_path, "--out", path / "x.html")
    importing = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name, name=name)
        return importing(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without_matplotlib)
        assert "pip install 'lightning-sage[plots]'" in refused(capsys, tmp_path)
    path.write_text("what?\nno\n")
    assert "line 1 is no JSON" in refused(capsys, tmp_path)
    path.write_text("")
    assert "holds no fit yet" in refused(capsys, tmp_path)


@pytest.fixture(scope="module")
def chromium():
    if browser.found() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    opened = browser.Browser()
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", ["whole", "killed", "many", "hostile"])
def test_a_page_opens_without_complaint(chromium, pages, name, width):
    chromium.open(pages[name], width)
    assert chromium.complaints() == []
    asked = [url for url in chromium.requests() if not url.startswith("data:")]
    assert asked == [pages[name].as_uri()]
    assert chromium.value("document.documentElement.scrollWidth") <= width
    inside = (
        "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.width, r.height, r.left, r.right])"
    )
    sizes = chromium.value(inside)
    assert len(sizes) == pages[name].read_text().count("<figure>") > 4
    assert all(w > 250 and h > 100 and left >= 0 and r <= width for w, h, left, r in sizes)
    # text of a figure stays inside of it, and its labels apart
    outside = chromium.value(
        "[...document.querySelectorAll('figure svg')].flatMap(s => { const o = "
        "s.getBoundingClientRect(); return [...s.querySelectorAll('text')].filter(t => { const r ="
        " t.getBoundingClientRect(); return r.left < o.left - 4 || r.right > o.right + 4 || r.top <"
        " o.top - 4 || r.bottom > o.bottom + 4; }).map(t => t.textContent); })"
    )
    assert outside == []


CONTRASTS = """
(() => {
  const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (color) => {
    probe.clearRect(0, 0, 1, 1); probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = probe.getImageData(0, 0, 1, 1).data;
    if (!a) return null;
    const f = (x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const found = light(getComputedStyle(e).backgroundColor);
      if (found !== null) return found;
    }
    return 1;
  };
  const all = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length || e.closest("script,style,option")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest("svg") ? style.fill : style.color), behind(e)];
    all.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className + e.textContent]);
  }
  return all.sort((x, y) => x[0] - y[0])[0];
})()
"""


@pytest.mark.parametrize("shades", ["kept", "replayed", "1"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_words_are_legible(chromium, pages, dark, shades):
    chromium.open(pages["whole"], dark=dark)
    choose(chromium, shades)
    contrast, words = chromium.value(CONTRASTS)
    assert contrast >= 4.5, words


def choose(chromium, value):
    chromium.value(
        "(() => { for (const s of document.querySelectorAll('.sample select')) { s.value = "
        f"'{value}'; s.dispatchEvent(new Event('change')); }} }})()"
    )


def test_a_dark_page_is_dark(chromium, pages):
    colours = {}
    for dark in (False, True):
        chromium.open(pages["whole"], dark=dark)
        style = "getComputedStyle(document.querySelector('{}')).{}"
        colours[dark] = [
            chromium.value(style.format("body", "backgroundColor")),
            chromium.value(style.format("figure svg text", "fill")),
            chromium.value(style.format(".k10", "backgroundColor")),
        ]
    assert colours[False][0] == "rgb(255, 255, 255)"
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True))


def visible(chromium, selector):
    return chromium.value(
        f"[...document.querySelectorAll('{selector}')].map(e => e.getClientRects().length > 0)"
    )


def test_the_token_view_shows_one_block(chromium, pages):
    chromium.open(pages["whole"])
    line = read(pages["whole"].with_name(NAME))[0].tokens[-1]
    choose(chromium, "2")
    classes = chromium.value(
        "[...document.querySelectorAll('.sample:last-of-type .text > span')].map(e => e.className)"
    )
    real = line["valid"].index("0")
    expected = [
        "again" if again == "1" else "kept" if kept == "1" else "k0"
        for kept, again in zip(line["kept"][2], line["replayed"][2], strict=True)
    ]
    assert [name.split()[0] for name in classes[:-1]] == expected[:real]
    assert [name.endswith(" l") for name in classes[:-1]] == [
        bit == "1" for bit in line["labels"][:real]
    ]
    assert classes[-1] == "pad"
    said = chromium.value("document.querySelector('.sample:last-of-type output').textContent")
    kept, again = (line[key][2].count("1") for key in ("kept", "replayed"))
    assert said == f"{kept} kept, {again} of them replayed"
    assert chromium.value("document.querySelectorAll('.chosen').length") == 2
    # and back: what the page says without scripts is what they say
    choose(chromium, "kept")
    spans = "[...document.querySelectorAll('.text > span')].map(e => e.className)"
    scripted = chromium.value(spans)
    chromium.open(pages["whole"], scripts=False)
    assert chromium.value(spans) == scripted
    chromium.open(pages["whole"])
    chromium.value("document.querySelectorAll('.rows tbody tr')[5].click()")
    assert chromium.value("document.querySelectorAll('.sample select')[1].value") == "1"


def test_samples_are_chosen_without_scripts(chromium, pages):
    chromium.open(pages["whole"], scripts=False)
    assert visible(chromium, ".sample") == [False, True]
    assert visible(chromium, ".shading") == [False, False]
    chromium.value("document.getElementById('sample-0').click()")
    assert visible(chromium, ".sample") == [True, False]
    strips = "[...document.querySelectorAll('.sample img')].map(e => e.naturalWidth)"
    chromium.value("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert chromium.value(strips) == [60] * 8


def test_the_summary_is_said_in_its_order(pages):
    labels = re.findall(r"<dt>(.*?)</dt>", pages["whole"].read_text())[: len(SUMMARY)]
    assert labels[0] == "tokens kept"
    assert labels[-1] == "seconds a step (median)"
