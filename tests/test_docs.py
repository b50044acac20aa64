"""The documentation: its code runs, its links lead somewhere, its site has what people look for."""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import unet_fast
from unet_fast import demo
from unet_fast.cli import main
from unet_fast.training import loop

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^( *)```(bash|python)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SMALL = {2: "--steps 2 --base-channels 2 --tile 68", 3: "--steps 2 --base-channels 2"}
REQUIRE_SITE = os.environ.get("UNET_FAST_REQUIRE_SITE") == "1"  # set where a skip would hide a bug


def links():
    """The script that knows where links lead outside of the repository."""
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in links().LINK.findall(text):
        assert "://" in link or (page.parent / link).exists(), link


def test_links_of_the_readme_on_an_index():
    """They are absolute, and all are made of one address."""
    script = links()
    text = script.dynamic_metadata({}, {})["readme"]["text"]
    home = script.PROJECT["urls"]["Homepage"]
    assert all(url.startswith(home) for url in script.PROJECT["urls"].values())
    found = re.findall(r"\]\(([^)]*)\)", text)
    assert all(link.startswith("https://") for link in found)
    assert f"{home}/blob/main/docs/training.md#from-four-commands" in found
    assert f"{home}/raw/main/docs/demo.png" in found
    assert text.count("](") == (ROOT / "README.md").read_text().count("](")


def samples(folder):
    """Bundled images where the pages have those of the reader."""
    for kind in ("images", "labels"):
        other = {"images": "stacks", "labels": "stack_labels"}[kind]
        of_new = {"images": ["new_images"], "labels": ["new_labels", "labels_of_new_images"]}[kind]
        for name in (kind, *of_new, other):
            (folder / name).mkdir()
        seen, new = (sorted((demo.SAMPLE / part / kind).iterdir()) for part in ("train", "test"))
        for path in seen[:3]:
            shutil.copy(path, folder / kind)
        for name in of_new:
            shutil.copy(new[0], folder / name / "a.png")
        for name, part in (("a.tif", "train"), ("b.tif", "test")):
            shutil.copy(demo.SAMPLES[3] / part / kind / "ovule.tif", folder / other / name)


def type_in(line):
    """Runs a command of a page, with fewer steps of a narrower network."""
    if line.startswith("unet-fast"):
        short = re.sub(r"--minutes \d+", SMALL[3 if "--dims 3" in line else 2], line)
        assert main(shlex.split(short, comments=True)[1:]) == 0, line


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/trainer.md"])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Block by block, as a reader does who has the images; only training is shorter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(demo.SETTINGS, 2, {"steps": 2, "base_channels": 2, "tile": 68})
    monkeypatch.setattr(loop, "cost_of", lambda _: (60.0, 10**9))  # `check` times no steps
    samples(tmp_path)
    names, ran = {}, set()
    for _, language, text in BLOCK.findall((ROOT / page).read_text()):
        code = textwrap.dedent(text)
        if language == "python":
            exec(compile(code, page, "exec"), names)
        else:
            for line in code.splitlines():
                type_in(line)
        ran.add(language)
    assert ran == ({"python"} if page == "docs/trainer.md" else {"python", "bash"})


def test_python_of_the_readme_is_short():
    (_, _, code), *others = (
        block for block in BLOCK.findall((ROOT / "README.md").read_text()) if block[1] == "python"
    )
    assert not others
    assert len([line for line in code.splitlines() if line]) <= 12


def needed(there, what):
    if not there:
        (pytest.fail if REQUIRE_SITE else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors: links, anchors, markup of docstrings."""
    found = all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "furo")))
    needed(found, "the extra `site`")
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "sphinx", "-W", "-n", "-q", "docs", str(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return folder


@pytest.mark.thorough
def test_site_has_every_public_name(site):
    head, body = (site / "objects.inv").read_bytes().split(b"using zlib.\n", 1)
    assert b"Sphinx inventory" in head
    listed = {line.split()[0] for line in zlib.decompress(body).decode().splitlines()}
    for module in (unet_fast, unet_fast.metrics, unet_fast.reference):
        assert listed >= {f"{module.__name__}.{name}" for name in module.__all__}
    commands = (site / "commands.html").read_text()
    for name in (
        "augment",
        "check",
        "demo",
        "evaluate",
        "export",
        "info",
        "predict",
        "train",
        "weights",
    ):
        assert f'id="unet-fast-{name}"' in commands
    assert "-m sphinx" not in re.sub("<[^>]+>", "", commands)


@pytest.mark.thorough
def test_search_finds_a_setting(site, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    needed(chromium, "chromium")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/search.html?q=seed_threshold"
            options = "--headless", "--no-sandbox", "--virtual-time-budget=20000"
            page = subprocess.run(
                [chromium, *options, f"--user-data-dir={tmp_path}", "--dump-dom", address],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            ).stdout
        finally:
            server.shutdown()
    results = re.findall(r'<a href="([\w.]+)[^>]*data-score', page)
    assert results
    assert all("seed_threshold" in (site / name).read_text() for name in results)
