"""The site of the documentation: built without a network, with each public name, and no link that leads nowhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise as rw

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.large
pytest.importorskip("mkdocstrings", reason="mkdocs is not installed: pip install -e '.[docs]'")


def build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_is_in_the_reference_with_its_docstring(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    found = re.findall(r'<h3 id="rankwise\.[\w.]+\.(\w+)"', page)
    assert sorted(found) == sorted({*rw.__all__} - {"__version__"})
    assert "what is wrong and what to do about it" in page


def test_no_page_asks_another_server_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="?https?:', text) == [], page.name


@pytest.mark.parametrize("link", ["nowhere.md", "ranks.md#nowhere", "../nowhere.py", "pictures/nowhere.png"])
def test_a_link_that_leads_nowhere_is_an_error(link: str, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    for name in ("examples/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "docs/ranks.md").write_text(
        f"# Ranks\n\n## Training with changing ranks\n\n![x]({link})\n[x]({link})\n"
    )
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1 and link.partition("#")[0] in done.stderr
