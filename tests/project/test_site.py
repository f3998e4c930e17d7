"""The pages as the site gets them; `make site` builds it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = _script("docs/site.py")
built = _script("tests/deploy/site.py")


def test_every_page_has_one_place_in_the_navigation() -> None:
    _, _, nav = (ROOT / "docs" / "mkdocs.yml").read_text().partition("\nnav:\n")
    placed = re.findall(r"^ +- ([\w-]+\.md)$", nav, re.MULTILINE)
    api = [f"api-{name}.md" for name in (*site.PYTHON, *site.SERVER)]
    assert sorted(placed) == sorted([*site.pages().values(), *api])


@pytest.mark.parametrize("source", site.pages())
def test_a_page_of_the_site_links_only_to_pages_of_it(source: str) -> None:
    page = site.page(source)
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    names = set(site.pages().values())
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        assert target in names or re.match(r"https?:|.*\.png$", target), target


def test_links_are_rewritten_outside_of_code() -> None:
    def rewritten(text: str) -> str:
        return str(site._LINK.sub(lambda link: site._linked("docs/api.md", link), text))

    assert (
        rewritten("[Rules](../CONTRIBUTING.md#the-rules)") == "[Rules](contributing.md#the-rules)"
    )
    assert rewritten("[files](../deploy)") == "files (`deploy`)"
    assert rewritten("[`deploy`](../deploy)") == "`deploy`"
    assert rewritten("[site](https://semver.org)") == "[site](https://semver.org)"
    with pytest.raises(ValueError, match=r"docs/api.md: links to nowhere.md, which does not exist"):
        rewritten("[x](nowhere.md)")
    assert "[#[m](x)]" not in site.page("README.md")


def test_what_a_browser_would_load_from_elsewhere_is_found() -> None:
    for html in (
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img alt="" src="http://example.com/x.png">',
        '<pre class="mermaid">',
    ):
        assert built.remote(html), html
    assert not built.remote('<script src="assets/x.js"></script><a href="https://semver.org">')
