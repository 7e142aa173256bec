"""What the site has besides the files of this folder: README, CONTRIBUTING, the changelog, docstrings."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import rankwise

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "readme.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""A file of the repository -> its page."""


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        text = re.sub(r"\]\((?:\.\./)*docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        text = re.sub(
            r"\[([^\]]*)\]\([\w/.]+\.(?:py|ipynb|yaml)\)", r"\1", text
        )  # a file of the repository, not of the site
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to what is a page of the site lead there."""
    for name, own in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}", f"]({own}", markdown)
    return markdown + api() if page.file.src_uri == "reference.md" else markdown


SECTIONS = {
    "api": "Commands as calls",
    "adapters": "Adapters",
    "train": "Training",
    "methods": "Methods",
    "ranks": "Ranks",
}
"""A room of the package -> the heading above its public names; names of other rooms come last."""


def api() -> str:
    """A heading for each room, and for each public name what mkdocstrings makes of its docstring."""
    below: dict[str, list[str]] = {heading: [] for heading in (*SECTIONS.values(), "The rest")}
    for name, module in rankwise._PUBLIC.items():
        same = ROOT / "src" / module.replace(".", "/") / f"{name}.py"  # then the package's name for it is the file's
        block = f"::: {module}.{name}{f'.{name}' if same.exists() else ''}\n"
        if module.startswith("rankwise.methods."):  # their options are all there is to say; what they do is their own
            block += "    options: {members: false}\n"
        below[SECTIONS.get(module.split(".")[1], "The rest")].append(block)
    return "".join(f"\n## {heading}\n\n" + "\n".join(blocks) for heading, blocks in below.items() if blocks)
