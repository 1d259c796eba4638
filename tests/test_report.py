"""The report: rules of the verdicts, tables and pages, from stored runs alone."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from stored_runs import store_mf as store
from stored_runs import store_vl_bart

from oplora import report
from oplora.report.page import Row, Section, Table, Writer, markdown_table
from oplora.studies.matrix_factorization.report import study
from oplora.studies.matrix_factorization.report.claims import claims

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stored(tmp_path):
    store(tmp_path, "mf", [0.3, 0.08, 0.08, 0.0601, None])
    store(tmp_path, "opmf", [0.08, 0.0601, 0.0601, 0.07, None])
    return tmp_path


def read(folder):
    records, _ = report.load_runs(folder)
    return study.studies(records)["sgd"]


def test_reaching_and_diverging_are_per_rate_majorities(stored):
    methods = read(stored)
    assert methods["mf"].reaches.tolist() == [False, False, False, True, False]
    assert methods["opmf"].reaches.tolist() == [False, True, True, False, False]
    assert methods["mf"].diverges.tolist() == [False] * 4 + [True]
    assert methods["mf"].best == 3 and methods["opmf"].best == 1


def test_a_claim_holds_on_the_grid_in_a_window_or_not(tmp_path):
    cases = {
        "holds": ([0.3, 0.3, 0.3, 0.3, None], [0.06, 0.06, 0.06, 0.06, None]),
        "only at equal rates": ([0.3, 0.3, 0.3, 0.3, 0.06], [0.06, 0.06, 0.06, 0.06, None]),
        "does not hold": ([0.3, 0.3, 0.06, 0.06, 0.06], [0.3, 0.3, 0.06, 0.3, None]),
    }
    for number, (verdict, (mf, op)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        store(folder, "mf", mf)
        store(folder, "opmf", op)
        (claim,) = [c for c in claims({"sgd": read(folder)}) if c.text.startswith("Four rates")]
        assert claim.verdict == verdict and claim.section == "4.1" and claim.figure == "figure2"
        if verdict == "only at equal rates":
            assert claim.where == "rates 0.01 to 10 (4 of 5)"


def test_deleting_a_run_changes_exactly_its_cells(stored, tmp_path):
    path = store(stored, "mf_matched", [0.2] * 5)
    report.build(stored).write(tmp_path / "before")
    table = "tables/mf_final_sgd.csv"
    before = pandas.read_csv(tmp_path / "before" / table)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    report.build(stored).write(tmp_path / "after")
    after = pandas.read_csv(tmp_path / "after" / table)
    pandas.testing.assert_frame_equal(before.drop(columns=["MF, OP's step sizes"]), after)


def test_rendering_twice_gives_the_same_bytes(stored, tmp_path):
    for name in ("a", "b"):
        report.build(stored).write(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_pages_escape_and_show_missing_values_as_dashes(tmp_path):
    rows = [Row({"method": "a|<b>", "mse": 0.5}), Row({"method": "c", "mse": None})]
    table = Table("t", "cap", rows)
    out = Writer(tmp_path).write("T & T", [Section("S", ["text <i>", table])])
    page = out.read_text()
    assert "T &amp; T" in page and "text &lt;i&gt;" in page and ">—</td>" in page
    assert markdown_table(table.frame).splitlines()[2:] == ["| a\\|<b> | 0.5 |", "| c | — |"]
    assert "http" not in page, "the page must be self-contained"


PROBE = """<iframe src="out/index.html" width="WIDTH" height="800"></iframe><pre></pre><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
onload = async () => {
  const frame = document.querySelector("iframe").contentWindow, page = frame.document;
  const all = (selector) => [...page.querySelectorAll(selector)], root = page.documentElement;
  for (let n = 0; n < 100 && !frame.explorer; n++) await wait(100);
  const ids = all("[id]").map((e) => e.id), symbol = all("#table-matrix a.holds")[0];
  const found = {
    overflow: root.scrollWidth - root.clientWidth,
    drawn: all("figure svg").filter((s) => s.getBoundingClientRect().height > 100).length,
    doubled: ids.filter((id, n) => ids.indexOf(id) !== n),
    lost_links: [...page.links].filter((a) => a.hash)
      .filter((a) => !page.getElementById(a.hash.slice(1))).length,
    schemes: frame.getComputedStyle(root).getPropertyValue("color-scheme"),
  };
  symbol.click();
  await wait(200);
  const evidence = page.getElementById(symbol.hash.slice(1));
  found.evidence = evidence.closest("details").open && evidence.textContent;
  const choice = all("#table-claims select")[0];
  choice.value = "holds";
  choice.onchange();
  const shown = all("#table-claims .card:not([hidden]) .verdict").map((v) => v.textContent);
  found.filtered = [...new Set(shown)];
  const dot = all("#vega path[aria-roledescription=point]")[0], box = dot.getBoundingClientRect();
  const up = { bubbles: true, view: frame };
  const at = { clientX: box.x + 3, clientY: box.y + 3, ...up };
  for (const kind of ["pointerover", "pointermove", "mousemove"]) {
    dot.dispatchEvent(new frame.PointerEvent(kind, at));
  }
  await wait(300);
  found.hover = all("#vg-tooltip-element")[0]?.textContent;
  const visible = () => all("#vega path[aria-roledescription=point]")
    .filter((p) => frame.getComputedStyle(p).opacity > 0.5).length;
  found.legend = [visible()];
  const entry = all("#vega .role-legend-symbol path")[0], spot = entry.getBoundingClientRect();
  for (const kind of ["pointerdown", "mousedown", "pointerup", "mouseup", "click"]) {
    const event = kind.startsWith("pointer") ? frame.PointerEvent : frame.MouseEvent;
    entry.dispatchEvent(new event(kind, { clientX: spot.x + 3, clientY: spot.y + 3, ...up }));
  }
  await wait(500);
  found.legend.push(visible());
  found.ink = frame.getComputedStyle(page.body).color;
  found.white = all("figure, figure *, .vega-embed *").map((e) => frame.getComputedStyle(e))
    .filter((s) => s.backgroundColor == "rgb(255, 255, 255)").length;
  document.querySelector("pre").textContent = JSON.stringify(found);
}
</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


@pytest.fixture
def page(stored, tmp_path):
    """A written report with verdicts; its folder."""
    for method, lr in (("lora", 1e-2), ("oplora", 1e-3)):
        for factor, loss in ((0.1, 0.5), (1, 0.2), (10, 0.4)):
            store_vl_bart(stored, method, lr * factor, 0, loss)
        for seed in range(2):
            store_vl_bart(stored, method, lr, seed, 0.2, accuracy=0.6 + seed / 10)
    report.build(stored).write(tmp_path / "out")
    return tmp_path


def browse(folder, *flags):
    """What Chromium does with an address and flags, which must not complain."""
    usual = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    usual += ["--enable-logging=stderr", "--virtual-time-budget=20000"]
    command = [BROWSER, *usual, f"--user-data-dir={folder}/profile", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    return done.stdout


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "light"), (1280, "dark")])
def test_the_page_in_a_browser(page, width, scheme):
    (page / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    colors = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    size = f"--window-size={width + 50},900"
    shown = browse(page, "--dump-dom", colors, size, f"{page}/probe.html")
    seen = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", shown)[1]))
    assert seen["overflow"] == 0 and seen["lost_links"] == 0 and seen["doubled"] == []
    assert seen["drawn"] > 5 and seen["schemes"] == "light dark"
    assert seen["evidence"].startswith("evidence here") and seen["filtered"] == ["holds"]
    assert "seed" in seen["hover"] and "small-lora-" in seen["hover"]
    assert seen["legend"][0] > seen["legend"][1] > 0, "a click in the legend shows one method"
    assert (seen["ink"] == "rgb(255, 255, 255)") == (scheme == "dark")
    assert seen["white"] == 0 or scheme == "light"


@needs_browser
@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="needs pdftotext")
def test_the_printed_page_has_every_claim(page):
    browse(page, f"--print-to-pdf={page}/page.pdf", f"{page}/out/index.html")
    done = subprocess.run(["pdftotext", page / "page.pdf", "-"], capture_output=True, text=True)
    printed = re.sub(r"\W", "", done.stdout)
    claims = json.loads((page / "out/summary.json").read_text())["claims"]
    assert len(claims) > 20
    for claim in claims:
        for text in (claim["text"], claim["evidence"]):
            assert re.sub(r"\W", "", text) in printed, text


def test_the_page_says_where_numbers_come_from_and_what_makes_missing_ones(tmp_path):
    runs = tmp_path / "runs"
    for lr, loss in ((1e-3, 0.5), (1e-2, 0.2)):
        path = store_vl_bart(runs, "lora", lr, 0, loss, accuracy=0.6)
    report.build(runs).write(tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    number = re.search(rf'<li id="(r\d+)" value="\d+">{path.name}: <a href="([^"]+)">', page)
    assert (tmp_path / "out" / number[2]).resolve() == path / "config.yaml"
    assert f'<a href="#{number[1]}">' in page
    command = "scripts/sweep_learning_rates.sh vl_bart method=oplora"
    assert f"<summary>—</summary><code>{command}</code>" in page
    assert command not in (tmp_path / "out" / "tables" / "controls.csv").read_text()
    ids = re.findall(r'\bid="([^"]*)"', page.split("<script type")[0])
    assert len(ids) == len(set(ids))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"] == 2 and "vl_bart_small_rates.svg" in summary["figures"]
    assert {c["verdict"] for c in summary["claims"]} >= {"not run yet"}


def test_the_script_ends_with_a_clear_error(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "report.py")]
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = subprocess.run([*script, str(folder)], capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
