"""mkdocs: pages that are files of the repository's root, with their links turned to the site's."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"index.md": "README.md", "architecture.md": "ARCHITECTURE.md", "contributing.md": "CONTRIBUTING.md"}


def on_page_markdown(markdown: str, page, **_: object) -> str:
    source = ROOT_PAGES.get(page.file.src_path)
    if source is None:
        return markdown
    text = (ROOT / source).read_text().replace("](docs/", "](")
    for site, name in ROOT_PAGES.items():
        text = text.replace(f"]({name})", f"]({site})")
    return re.sub(r"\]\(monitoring\)", "](monitoring/README.md)", text)
