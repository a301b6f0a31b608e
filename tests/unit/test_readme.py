"""The README as a package index shows it: outside this repository, where relative links lead nowhere."""

import re

import pytest
from support.files import ROOT

# Targets of Markdown's links and images, and of HTML's.
LINK = re.compile(r"\]\(\s*([^)\s]+)|(?:href|src)=\"([^\"]+)\"")
REPOSITORY = re.compile(
    r"https://(?:github\.com/vllm-mla-plugin/vllm-mla-plugin/(?:blob|tree|raw)/main"
    r"|raw\.githubusercontent\.com/vllm-mla-plugin/vllm-mla-plugin/main)/([^#?]*)"
)


def links() -> list[str]:
    found = [first or second for first, second in LINK.findall((ROOT / "README.md").read_text())]
    assert found
    return found


@pytest.mark.xfail(strict=True, reason="the README is to be rewritten")
def test_links_are_absolute() -> None:
    assert not [link for link in links() if not link.startswith(("https://", "mailto:", "#"))]


def test_files_that_are_linked_exist() -> None:
    """Of relative links, and of absolute ones that lead into this repository."""
    inside = [REPOSITORY.sub(r"\1", link).split("#")[0] for link in links()]
    paths = [path for path in inside if path and not path.startswith(("https://", "mailto:"))]
    assert not [path for path in paths if not (ROOT / path).exists()]
