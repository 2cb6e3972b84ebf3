"The site builds without a warning, its links resolve, and a browser finds nothing wrong with it."

import functools
import http.server
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from lab_run import QUIET, chromium

ROOT = Path(__file__).resolve().parents[1]
HERE = "http://here/"


def test_computed_pages_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs/pages.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("myst_nb", reason="the site needs kdnb[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "docs/site.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr[-3000:]
    return folder / "html"


class Page(HTMLParser):
    "What a page links to, what it loads, what can be linked to, and pictures without a text."

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.silent = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.ids |= {about[key] for key in ("id", "name") if about.get(key)}
        if tag == "a" and about.get("href"): self.links.append(about["href"])
        elif tag == "link" and about.get("rel") != "canonical": self.loads.append(about.get("href"))
        elif tag in ("script", "img", "iframe") and about.get("src"): self.loads.append(about["src"])
        if tag == "img" and not (about.get("alt") or "").strip(): self.silent.append(about.get("src"))


def test_links_resolve_and_nothing_is_loaded_from_elsewhere(site):
    pages = {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html")}
    assert len(pages) > 60
    for name, page in pages.items():
        for target in page.links + page.loads:
            where = urlsplit(urljoin(HERE + name, target))
            if where.netloc != "here":
                assert target not in page.loads, f"{name} loads {target}"
                continue
            path = unquote(where.path).lstrip("/") or "index.html"
            assert (site / path).is_file(), f"{name} links to {target}"
            if where.fragment and path in pages:
                assert unquote(where.fragment) in pages[path].ids, f"{name}: no anchor {target}"


def test_every_picture_has_a_text(site):
    silent = {p.name: Page(p).silent for p in site.rglob("*.html")}
    assert not any(silent.values()), {name: found for name, found in silent.items() if found}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words): pass


@pytest.fixture
def address(site):
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by kdnb[lab]")
    if chromium() is None: pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium(), args=QUIET)
        yield found
        found.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_browser(address, browser, width):
    "No error, no request to another host, nothing wider than the screen; the search finds a lesson."
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:")) else wrong.append(r.url))
    for name in ("index", "lessons/20_bss", "results", "api/bss"):
        page.goto(f"{address}{name}.html")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide"
    page.goto(f"{address}search.html?q=boundary")
    page.locator("#search-results li a").first.wait_for(timeout=20_000)
    page.locator("#search-results li a[href*='20_bss']").first.click()
    page.wait_for_url("**/20_bss.html*")
    assert page.locator("h1").first.inner_text().startswith("BSS")
    assert not wrong, wrong
