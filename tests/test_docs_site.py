"""The documentation site, opened from its folder as a reader does, without a server or network."""

import subprocess
import sys
import time

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT

RESULTS = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


def type_text(page, text):
    for character in text:
        page.call("Input.dispatchKeyEvent", type="keyDown", text=character, key=character)
        page.call("Input.dispatchKeyEvent", type="keyUp", key=character)


def wait_for(page, script, seconds=20):
    """Return the value of a JavaScript expression as soon as it is not empty."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := page.run(script):
                return value
        except AssertionError as error:  # another page is being opened
            if "navigated" not in str(error):
                raise
        time.sleep(0.1)
    raise AssertionError(script)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 420])
def test_search_works_from_the_folder_and_requests_nothing_from_the_network(site, width):
    with Browser(width, 900) as page:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.open(site / "start.html")
        page.run("document.querySelector('label[for=__search].md-header__button').click()")
        page.run("document.querySelector('.md-search__input').focus()")
        type_text(page, "grad_steps")
        results = wait_for(page, RESULTS)
        assert any("performance.html" in link for link in results)
        page.run("document.querySelector('.md-search-result__link').click()")
        wait_for(page, "document.querySelector('h1') && !location.href.includes('start.html')")
        assert all(url.startswith("file:") for url in page.requests) and not page.problems


def test_the_api_page_shows_every_member_that_it_lists(site):
    listed = (ROOT / "docs/api.md").read_text().split("members: [")[1].split("]")[0].split(", ")
    shown = (site / "api.html").read_text()
    assert len(listed) > 5
    for member in listed:
        assert f'id="lit_distill.DirectDistill.{member}"' in shown, member
