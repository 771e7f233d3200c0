"""Pages as a browser shows them: headless Chromium, with niivue where ``.ci/browser`` has got it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from pypdf import PdfReader
from report_case import prediction, scans
from test_report import cohort

from scripts.prediction.report import write_report
from scripts.prediction.summary import write_summary
from scripts.prediction.viewer import read_niivue, write_viewer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
NIIVUE = os.environ.get("NIIVUE", "")
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
needs_niivue = pytest.mark.skipif(not NIIVUE, reason="NIIVUE does not name the npm package of niivue: see .ci/browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
__all__ = ["cohort"]  # a fixture


def chromium(profile: Path, page: Path, *options: str) -> str:
    """What the browser prints; it waits until the page has nothing more to do."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def tried(page: Path, script: str) -> Path:
    """A copy of the page that does something by itself."""
    copy = page.with_name(f"tried_{page.name}")
    start, end, rest = page.read_text(encoding="utf-8").rpartition("</body>")  # niivue has the word, too
    copy.write_text(f"{start}<script>{script}</script>{end}{rest}", encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ct, pet, mask = scans()
    return write_viewer(tmp_path_factory.mktemp("viewer"), prediction(), ct, pet, mask, read_niivue(NIIVUE))


CLICKS = """
const wait = () => new Promise(done => setTimeout(done, 200)), said = [];
(async () => {
  while (document.body.dataset.ready !== "yes") await wait();
  const note = () => said.push(document.getElementById("position").textContent);
  const scene = document.getElementById("scene");
  const key = name => scene.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
  note();
  document.querySelectorAll("button.lesion")[1].click(); note();
  key("1"); note();
  key("n"); note();
  key("PageUp"); note();
  key("p"); key("b"); key("+");
  const pressed = [...document.querySelectorAll("button[aria-pressed=true]")].map(button => button.dataset.value);
  document.body.innerHTML = "<pre id=said></pre>";
  document.getElementById("said").textContent = JSON.stringify([said, pressed]);
})();
"""


@needs_niivue
def test_a_click_on_a_lesion_moves_the_crosshair_to_its_centre(viewer: Path, tmp_path: Path) -> None:
    page = chromium(tmp_path, tried(viewer, CLICKS), *SOFTWARE_GL, "--dump-dom")
    found = re.search(r'<pre id="said">(.*?)</pre>', page, re.DOTALL)
    assert found, page[-3000:]
    positions, pressed = json.loads(html.unescape(found[1]))
    first, second = "L 84.0  A 92.0  S 76.0 mm\n40 HU, SUV ", "L 48.0  A 116.0  S 116.0 mm\n40 HU, SUV "
    expected = (first, second, first, second, "L 48.0  A 120.0  S 128.0 mm")
    for said, begins in zip(positions, expected, strict=True):
        assert said.startswith(begins)
    assert pressed == ["PET", "all", "bone", "1"]


@needs_niivue
@pytest.mark.parametrize("width", [390, 1366])
def test_the_scans_are_seen(viewer: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "shot.png"
    chromium(tmp_path / "profile", viewer, *SOFTWARE_GL, f"--screenshot={shot}", f"--window-size={width},900")
    picture = matplotlib.image.imread(shot)[..., :3]
    assert picture.shape[1] == width
    red, green, blue = np.moveaxis(picture, -1, 0)
    assert ((red < 0.05) & (green < 0.05) & (blue < 0.05)).mean() > 0.05, "air"
    assert ((red > 0.85) & (green < 0.3) & (blue < 0.3)).sum() > 20, "outline of the primary tumour"
    tissue = (abs(green - blue) < 0.03) & (red - green < 0.15) & (red > 0.35) & (red < 0.65)
    assert tissue.mean() > 0.03


@needs_niivue
def test_without_webgl_the_pictures_are_seen(viewer: Path, tmp_path: Path) -> None:
    page = chromium(tmp_path, viewer, "--disable-3d-apis", "--dump-dom")
    assert "The viewer needs WebGL 2" in re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert re.search(r'<div id="viewer" hidden(="")?>', page)
    assert re.search(r'<div id="pictures">', page)


def test_a_report_is_printed_on_two_pages(tmp_path: Path) -> None:
    ct, pet, mask = scans()
    page, _ = write_report(tmp_path, prediction(), ct, pet, mask)
    chromium(tmp_path / "profile", page, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'print.pdf'}")
    assert len(PdfReader(tmp_path / "print.pdf").pages) == 2


SORT = """
const column = [...document.querySelectorAll("th")].find(head => head.textContent === "risk percentile");
const rows = () => [...column.closest("table").tBodies[0].rows];
column.click();
document.body.dataset.up = rows().map(row => row.cells[0].textContent.trim()).join(",");
column.click();
document.body.dataset.down = rows().map(row => row.cells[2].dataset.sort).join(",");
"""


def test_the_table_of_patients_is_sorted(cohort: Path, tmp_path: Path) -> None:
    path = cohort / "B_b" / "prediction.json"
    said = json.loads(path.read_text())
    said["survival"]["percentile"] = 9.5
    path.write_text(json.dumps(said))
    page = chromium(tmp_path / "profile", tried(write_summary(cohort), SORT), "--dump-dom")
    up, down = (re.search(rf'data-{name}="([^"]*)"', page)[1] for name in ("up", "down"))  # type: ignore[index]
    assert html.unescape(up).split(",")[:2] == ["B & <b>", "A-1"], "by number: 9.5 comes before 81.2"
    assert down.split(",") == ["81.2", "9.5", "", ""], "what is unknown stays last"
