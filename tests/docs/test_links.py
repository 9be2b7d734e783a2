"""Links, paths and names in the documents lead somewhere."""

import importlib
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, TOP, blocks, name_of, prose, spans

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ROOMS = ("flows", "sftok", "generator", "infra", "tests", "docs")


def heading_texts(page: Path) -> list[str]:
    found = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in found]


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub and mkdocs agree on."""
    github, mkdocs = set(), set()
    for text in heading_texts(page):
        plain = re.sub(r"[^\w\s-]", "", text).strip().lower()
        github.add(plain.replace(" ", "-"))
        mkdocs.add(re.sub(r"[-\s]+", "-", plain))
    return github & mkdocs


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page):
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{name_of(page)} links to {target}"
        assert file.parent == ROOT or DOCS in file.parents, f"{name_of(page)} links out of the documents: {target}"
        if page not in TOP:
            assert DOCS in file.parents, f"{name_of(page)}: the site has no {target}"
        assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_repository_exist(page):
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join(ROOMS)})/[\w./-]+", span) and "add-a-source" not in name_of(page):
            assert (ROOT / span).exists(), f"{name_of(page)}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_the_code_exist(page):
    for span in spans(page):
        found = re.fullmatch(rf"((?:{'|'.join(ROOMS[:4])})(?:\.\w+)+)\.(\w+)(?:\(.*\))?", span)
        if found and (ROOT / f"{found[1].replace('.', '/')}.py").exists():
            assert hasattr(importlib.import_module(found[1]), found[2]), f"{name_of(page)}: {span}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_imports_of_the_examples_exist(page):
    for block in blocks(page, "python"):
        for module, names in re.findall(
            r"^from ((?:flows|sftok|generator|infra)[\w.]*) import (.+)$", block.text, re.MULTILINE
        ):
            made = importlib.import_module(module)
            for name in names.split(","):
                assert hasattr(made, name.strip()), f"{name_of(page)}: {module}.{name.strip()}"


def test_every_page_is_on_the_site():
    """Guards against a page that no other page leads to."""
    index = (DOCS / "index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.is_relative_to(DOCS) and page.name != "index.md":
            path = page.relative_to(DOCS).as_posix()
            assert f"({path})" in index, path
            assert path in navigation, path


def test_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_comments_that_cite_the_method_resolve():
    """A comment says "method.md 1.3"; the page has such a section."""
    sections = set(re.findall(r"^#{2,3} (\d(?:\.\d)?)\.? ", (DOCS / "explanation/method.md").read_text(), re.MULTILINE))
    cited = 0
    for room in ROOMS[:5]:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path == Path(__file__):
                continue
            text = path.read_text()
            assert not re.search(r"\bMETHOD\b", text), f"{name_of(path)} cites METHOD: write method.md N.M"
            for section in re.findall(r"\bmethod\.md (\d(?:\.\d)?)", text):
                assert section in sections, f"{name_of(path)} cites method.md {section}"
                cited += 1
    assert cited > 20


def test_messages_that_the_runbook_quotes_are_said():
    """Guards against a message that is reworded and no longer found by who is on duty."""
    source = "\n".join(path.read_text() for path in (ROOT / "flows").rglob("*.py"))
    runbook = (DOCS / "operations/runbook.md").read_text()
    for message in ("not done within", "no sign of life"):
        assert message in runbook
        assert message in source, message
