"""report.html: all sections, nothing from elsewhere, names shown as they are; and a real browser's word for it."""

import copy
import json
import re
import shutil
import subprocess
import sys
from html import unescape

import numpy as np
import pytest

from lowmem_wanda import compare, evaluate, prune
from lowmem_wanda.cli.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '_<script><!-- font-family: x id="y url(#z $a$ 模型'
ALWAYS = {"arguments", "versions", "limits"}
SECTIONS = {
    "prune": {"summary", "sparsity", "score", "quantization", "time", "memory"},
    "eval": {"quality", "block-error", "tasks", "time", "memory"},
    "compare": {"comparison", "spread", "block-error"},
}


@pytest.fixture(scope="module")
def made(tiny, token_file, tmp_path_factory):
    """A real report of each kind."""
    folder, source = tmp_path_factory.mktemp("reports"), tiny("llama")
    text, evaluated = {"text": [str(token_file)], "length": 16, "device": "cpu"}, []
    pruned = prune(source, folder / "pruned", text=[str(token_file)])
    evaluate(folder / "pruned", **text, against=source, on_report=evaluated.append)
    (report,) = evaluated
    report["models"][0]["tasks"] = {"boolq": {"alias": "boolq", "acc": 0.5, "acc_stderr": 0.01}}
    report["arguments"] = {"text": HOSTILE}
    chosen = {"methods": ["magnitude", "wanda"], "patterns": ["2:4"], "sequences": [2], "seeds": [0, 1]}
    compared = compare(source, folder / "compared", **text, **chosen, calibration=[str(token_file)])
    return json.loads(json.dumps({"prune": pruned, "eval": report, "compare": compared}))


@pytest.fixture
def reports(made):
    """The same, to be changed."""
    return copy.deepcopy(made)


def sections(html):
    return re.findall(r'<section id="([^"]+)">', html)


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_section_is_there_and_nothing_from_elsewhere(reports, kind):
    html = page(reports[kind])
    assert set(sections(html)) == ALWAYS | SECTIONS[kind] and html.count("<svg") >= 2
    tags = "".join(re.findall("<[^>]+>", html))
    identifiers = re.findall(r'\bid="([^"]+)"', tags)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', tags)) <= set(identifiers)
    assert not re.search(r'(?:href|src)="[^#]|url\([^#]|https?://|<script|<image|@import', html)
    assert html == page(reports[kind])
    assert "currentColor" in tags and "#010203" not in tags and "font-family" not in tags


def test_figures_stand_in_the_page(reports):
    model = reports["eval"]["models"][0]
    html = page(reports["eval"])
    for figure in (
        f"{model['perplexity']:.3f} ± {model['perplexity_stderr']:.3f}",
        "perplexity at 16",
        f"{model['kl_mean']:.4f} ±",
        f"{model['kl_max']:.2f}",
        "0.5000 ± 0.0100",
        "windows of 16",
    ):
        assert figure in html
    assert "stay as large" in page(reports["prune"]) and "stay as large" in html


def test_the_best_of_each_pattern_stands_out(reports):
    report = reports["compare"]
    row = report["rows"][0]
    found = (("2:4", 12.5), ("50%", 9.5), ("2:4", 11.5), ("50%", 7.5), ("50%", 8.5))
    report["rows"] = [{**row, "pattern": pattern, "perplexity": value} for pattern, value in found]
    assert re.findall(r"<b>([\d.]+) ±", page(report)) == ["11.500", "7.500"]


def test_names_are_shown_not_run(reports):
    """Neither as HTML nor, in a figure, as a formula; a letter that the figure's font has not warns of nothing."""
    report = reports["eval"]
    other = copy.deepcopy(report["models"][0])
    report["models"].append({**other, "path": f"models/{HOSTILE}"})
    html = page(report)
    assert "<script" not in html and html.count("<svg") == html.count("</svg>") == 5
    labels = [unescape(label) for label in re.findall(r"<text[^>]*>(.*?)</text>", html)]
    assert f" {HOSTILE}" in labels
    identifiers = re.findall(r' id="([^"]+)"', "".join(re.findall("<[^>]+>", html)))
    assert len(identifiers) == len(set(identifiers))


def test_without_matplotlib_the_page_says_what_to_install(reports, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = page(reports["prune"])
    assert html.count("No plots: pip install matplotlib") == 4 and "<svg" not in html
    assert set(sections(html)) == ALWAYS | SECTIONS["prune"]


def test_what_a_report_lacks_has_no_section(reports):
    pruned, evaluated, compared = reports["prune"], reports["eval"], reports["compare"]
    del pruned["memory"]
    for block in pruned["blocks"]:
        for linear in block["linears"].values():
            del linear["score"]
    html = page(pruned)
    assert "score" not in sections(html) and html.count("<svg") == 1
    model = evaluated["models"][0]
    del evaluated["length"]
    evaluated["models"] = [{"path": model["path"], "tasks": model["tasks"]}]
    assert set(sections(page({**evaluated, "against": None}))) == {"tasks", "limits", "versions", "arguments"}
    begun = {**compared, "rows": [], "dense": None, "spread": []}
    assert set(sections(page(begun))) == {"limits", "versions"} | ({"arguments"} & set(sections(page(begun))))


def test_linears_that_some_blocks_lack_and_scores_of_zero(reports):
    report = reports["prune"]
    first, *_ = report["blocks"]
    gone = next(iter(first["linears"]))
    del first["linears"][gone]
    score = next(iter(first["linears"].values()))["score"]
    score["quantiles"] = dict.fromkeys(score["quantiles"], 0.0)
    assert set(sections(page(report))) == ALWAYS | SECTIONS["prune"]
    for block in report["blocks"]:
        for linear in block["linears"].values():
            linear["score"]["quantiles"] = score["quantiles"]
    assert page(report).count("<svg") == 3


@pytest.mark.slow
def test_a_deep_model_is_no_large_page(reports):
    report, draw = reports["prune"], np.random.default_rng(0)

    def linear(record):
        score = {**record["score"], "lost": draw.random()}
        return {**record, "sparsity": draw.random(), "score": score}

    block = report["blocks"][0]
    report["blocks"] = [
        {
            **block,
            "index": index,
            "linears": {name.replace(".0.", f".{index}."): linear(one) for name, one in block["linears"].items()},
        }
        for index in range(126)
    ]
    html = page(report)
    assert max(map(len, re.findall(r"<svg.*?</svg>", html, flags=re.S))) < 200_000 and len(html) < 700_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_browser_shows_it_on_a_phone(reports, tmp_path, kind):
    """The page in a frame of 390 px: its width and sections as the browser has them, and no error in the console."""
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(page(reports[kind]), "utf-8")
    (tmp_path / "frame.html").write_text(
        """<iframe id="f" src="page.html" width="390" height="844" style="border:0"></iframe><script>
        onload = () => { const page = f.contentDocument, size = element => element.getBoundingClientRect();
          document.title = JSON.stringify([page.documentElement.scrollWidth,
            [...page.querySelectorAll("section")].filter(s => size(s).height > 20).map(s => s.id),
            [...page.querySelectorAll("svg")].every(s => size(s).width > 300 && size(s).height > 80),
            [...page.querySelectorAll("svg text")].every(t => parseFloat(getComputedStyle(t).fontSize) >= 9),
            [...page.querySelectorAll("svg text")].filter(t => size(t).left < 0 || size(t).right > 390).length]) }
        </script>"""
    )
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               "--enable-logging=stderr", "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    width, shown, drawn, readable, outside = json.loads(title[1].replace("&quot;", '"'))
    assert width <= 390 and set(shown) == ALWAYS | SECTIONS[kind] and drawn and readable and not outside
    assert "CONSOLE" not in done.stderr
    for scheme, paper in ((1, 1.0), (0, 0.08)):  # light, dark
        shot = tmp_path / f"shot{scheme}.png"
        look = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=500,844", f"--screenshot={shot}"]
        subprocess.run([*command, *look, f"file://{tmp_path}/page.html"], capture_output=True, timeout=120)
        grey = imread(shot)[..., :3].mean(axis=2)
        assert np.median(grey) == pytest.approx(paper, abs=0.03) and (abs(grey - paper) > 0.3).mean() > 0.005


def test_experts_of_a_layer_are_one_kind_of_matrix(tiny, token_file, tmp_path):
    report = prune(tiny("qwen3_moe"), tmp_path / "out", text=[str(token_file)])
    shown = set(re.findall(r"mlp\.experts\.[^<]+", unescape(page(json.loads(json.dumps(report))))))
    assert shown == {f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")}
