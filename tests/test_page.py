"""report.html: all sections, nothing from elsewhere, names shown as they are; and a real browser's word for it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from lowmem_wanda.compare import compare, variants
from lowmem_wanda.evaluate import evaluate
from lowmem_wanda.page import page
from lowmem_wanda.prune import prune
from lowmem_wanda.report import evaluation
from lowmem_wanda.task import prepare
from lowmem_wanda.windows import windows
from lowmem_wanda.work import open_work

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert('x')</script>"
ALWAYS = {"arguments", "versions", "limits"}
SECTIONS = {
    "prune": {"summary", "sparsity", "score", "time", "memory"},
    "eval": {"quality", "block-error", "tasks", "time", "memory"},
    "compare": {"comparison", "spread", "block-error"},
}


@pytest.fixture(scope="module")
def reports(tiny, token_file, tmp_path_factory):
    """A real report of each kind."""
    folder, source = tmp_path_factory.mktemp("reports"), tiny("llama")
    text = windows([str(token_file)], list, length=16, vocabulary=96)
    pruned = prune(prepare(source, text=[str(token_file)]), folder / "pruned")
    result = evaluate(open_work(folder / "pruned", device="cpu"), text, open_work(source, device="cpu"))
    result["tasks"] = {"boolq": {"acc": 0.5, "acc_stderr": 0.01}}
    chosen = variants(["wanda"], ["2:4"], sequences=[2], seeds=[0, 1])
    machine, calibration = {"device": "cpu"}, [str(token_file)]
    compared = compare(
        source, folder / "compared", chosen, text, calibration=calibration, length=16, machine=machine, arguments={}
    )
    made = {"prune": pruned, "eval": evaluation(text, [result], {"--text": HOSTILE}), "compare": compared}
    return json.loads(json.dumps(made))


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_section_is_there_and_nothing_from_elsewhere(reports, kind):
    html = page(reports[kind])
    sections = re.findall(r'<section id="([^"]+)">', html)
    assert set(sections) == ALWAYS | SECTIONS[kind] and html.count("<svg") >= 2
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    assert not re.findall(r'(?:href|src)="(?!#|data:image/png;base64,)|url\((?!#)', html)
    assert set(re.findall(r'https?://[^"]+', html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in html and html == page(reports[kind])
    assert "currentColor" in html and "#010203" not in html


def test_figures_stand_in_the_page(reports):
    model = reports["eval"]["models"][0]
    html = page(reports["eval"])
    for figure in (
        f"{model['perplexity']:.3f} ±",
        "perplexity at 16",
        f"{model['kl_mean']:.4f}",
        "0.5000",
        "windows of 16",
    ):
        assert figure in html
    assert "stay as large" in page(reports["prune"]) and "smaller" in html


def test_names_are_shown_not_run(reports):
    report = json.loads(json.dumps(reports["eval"]))
    report["models"][0]["path"] = HOSTILE
    html = page(report)
    assert "<script" not in html and "&lt;script&gt;" in html


def test_without_matplotlib_the_page_says_what_to_install(reports, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = page(reports["prune"])
    assert html.count("No plots: pip install matplotlib") >= 3 and "<svg" not in html


def test_a_deep_model_is_no_large_page(reports):
    report = json.loads(json.dumps(reports["prune"]))
    block = report["blocks"][0]
    report["blocks"] = [
        {**block, "index": index, "linears": {k.replace(".0.", f".{index}."): v for k, v in block["linears"].items()}}
        for index in range(126)
    ]
    assert len(page(report)) < 1_500_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_browser_shows_it_on_a_phone(reports, tmp_path, kind):
    """The page in a frame of 390 px: its width and sections as the browser has them, and no error in the console."""
    (tmp_path / "page.html").write_text(page(reports[kind]), "utf-8")
    (tmp_path / "frame.html").write_text(
        """<iframe id="f" src="page.html" width="390" height="844" style="border:0"></iframe><script>
        onload = () => { const page = f.contentDocument;
          document.title = JSON.stringify([page.documentElement.scrollWidth,
            [...page.querySelectorAll("section")].filter(s => s.getBoundingClientRect().height > 20).map(s => s.id),
            [...page.querySelectorAll("svg")].every(s => s.getBoundingClientRect().width > 200)]) }</script>"""
    )
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               "--enable-logging=stderr", "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    width, sections, drawn = json.loads(title[1].replace("&quot;", '"'))
    assert width <= 390 and set(sections) == ALWAYS | SECTIONS[kind] and drawn
    assert "CONSOLE" not in done.stderr
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", f"file://{tmp_path}/page.html"], capture_output=True, timeout=120)
    assert shot.stat().st_size > 10_000
