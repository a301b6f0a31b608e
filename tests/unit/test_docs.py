"""The documents: links have targets, commands and options exist, and quoted errors are in the code."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from benchmarks.common import result
from mla_converters.cli.main import app
from scripts.family_table import PAGE, with_table
from vllm_mla_plugin.checkpoint.families import FAMILIES

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/vllm-mla-plugin/vllm-mla-plugin"
PACKAGES = (ROOT / "converters" / "mla_converters", ROOT / "vllm_mla_plugin")
DOCUMENTS = sorted((*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")))
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    for name, command in typer.main.get_command(app).commands.items()
}
# Options of other commands, which the documents mention without the command.
FOREIGN = {
    "--block-size",
    "--decode-context-parallel-size",
    "--enable-expert-parallel",
    "--enforce-eager",
    "--hf-overrides",
    "--kv-cache-dtype",
}
ERRORS = {"ConversionError", "OptionError", "StoppedError", "UnfinishedError"}
MOST_WORDS = 2
"""A message with at most this many fixed words is put together from other messages."""
VARIES = "…"
"""Stands in a quoted error for a part that changes."""


@cache
def tokens(document: Path) -> list[Token]:
    """The blocks of a document, and then the tokens inside them."""
    blocks = MarkdownIt("commonmark").enable("table").parse(document.read_text())
    return blocks + [child for block in blocks for child in block.children or ()]


def spans(document: Path) -> list[str]:
    """The spans of code in a document's text, without line breaks."""
    return [" ".join(token.content.split()) for token in tokens(document) if token.type == "code_inline"]


def code(document: Path) -> Iterator[str]:
    """The code of a document, one command at a time, without comments."""
    yield from spans(document)
    for token in tokens(document):
        if token.type in ("code_block", "fence"):
            for line in token.content.replace("\\\n", " ").splitlines():
                yield line.split(" #")[0]


@cache
def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    blocks, seen, found = tokens(document), Counter[str](), set()
    for heading, content in pairwise(blocks):
        if heading.type == "heading_open":
            text = "".join(child.content for child in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def first_cells(document: Path) -> Iterator[tuple[str, list[str]]]:
    """For each row of a table, the heading above it, and the spans of code in its first cell."""
    heading, blocks = "", tokens(document)
    for before, block, after in zip(blocks, blocks[1:], blocks[2:], strict=False):
        if before.type == "heading_open":
            heading = block.content
        if before.type == "tr_open" and block.type == "td_open":
            yield heading, [" ".join(c.content.split()) for c in after.children or () if c.type == "code_inline"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document: Path) -> None:
    """Every link into this repository leads to a file or a heading. README must not have relative links."""
    links = [token.attrGet("href") or token.attrGet("src") for token in tokens(document)]
    for link in map(str, filter(None, links)):
        path, _, anchor = link.partition("#")
        if file := re.match(f"{HOME}/(?:blob|tree)/main/(.*)", path):
            target = ROOT / file[1]
        elif path.startswith("https://"):
            continue
        else:
            assert document != ROOT / "README.md", f"{link} does not work on a package index"
            target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands(document: Path) -> None:
    """All commands, options, modules and files that a document names exist."""
    for line in code(document):
        for command, rest in re.findall(r"vllm-mla ([a-z]+)(?![\w-])(.*)", line):
            unknown = set(re.findall(r"--[a-z][a-z-]*", rest)) - OPTIONS[command]
            assert not unknown, f"{line}: {unknown}"
        for module in re.findall(r"python -m ((?:benchmarks|scripts)\.[a-z0-9_]+)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), line
    for span in spans(document):
        if option := re.match(r"--[a-z][\w-]*", span):
            assert any(option[0] in options for options in OPTIONS.values()) or option[0] in FOREIGN, span
        if re.fullmatch(r"(benchmarks|docker|scripts|tests)/[\w./]+", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("command", OPTIONS)
def test_reference_has_every_option(command: str) -> None:
    """The tables of the reference list exactly the options of the command."""
    rows = first_cells(ROOT / "docs" / "reference" / "command-line.md")
    listed = {span for heading, cell in rows if heading == f"vllm-mla {command}" for span in cell}
    assert {option for option in listed if option.startswith("--")} == OPTIONS[command]


def sentence(node: ast.expr | None) -> str | None:
    """A string of the source as a document quotes it, with ``…`` for parts that vary. None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(sentence(part) or VARIES for part in node.values)
    return None


@cache
def said() -> tuple[set[str], set[str]]:
    """All strings of the packages except docstrings, and those of them that are messages of errors for users."""
    strings, errors = set(), set()
    for package in PACKAGES:
        kinds = ERRORS if package.name == "mla_converters" else {"ValueError"}
        for path in package.rglob("*.py"):
            tree = ast.parse(path.read_text())
            docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            strings |= {text for node in ast.walk(tree) if node not in docstrings and (text := sentence(node))}
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds:
                    messages = filter(None, map(sentence, call.args))
                    errors |= {text for text in messages if len(re.findall(r"\w\w+", text)) > MOST_WORDS}
    return strings, errors


def quoted() -> list[tuple[str, re.Pattern[str]]]:
    """The sentences that the troubleshooting page quotes, each with a pattern that matches it."""
    cells = [cell for _, cell in first_cells(ROOT / "docs" / "troubleshooting.md")]
    quotes = [span for cell in cells for span in cell]
    return [(quote, re.compile(".*".join(map(re.escape, quote.split(VARIES))), re.DOTALL)) for quote in quotes]


def test_quoted_errors_are_said() -> None:
    """The page quotes the code's messages, so that a user who searches it for a message finds it."""
    strings, _ = said()
    assert len(quoted()) > 100
    stale = [quote for quote, pattern in quoted() if not any(map(pattern.search, strings))]
    assert not stale, "docs/troubleshooting.md quotes what the code no longer says"


def test_every_error_is_quoted() -> None:
    _, errors = said()
    assert len(errors) > 100
    missing = sorted(error for error in errors if not any(pattern.search(error) for _, pattern in quoted()))
    assert not missing, "docs/troubleshooting.md needs a row for each"


def test_picture_has_every_room() -> None:
    """The picture of the architecture in CONTRIBUTING.md names every module and folder of both packages."""
    (picture,) = (t.content for t in tokens(ROOT / "CONTRIBUTING.md") if t.type == "fence")
    rooms = {
        path.stem
        for package in PACKAGES
        for path in package.iterdir()
        if path.name[0] not in "_." and path.suffix in ("", ".py")
    }
    assert rooms <= set(re.findall(r"\w+", picture))


def test_table_of_families() -> None:
    """It is the one that its script writes, and every family was served."""
    rows = result("served_families")["families"]
    assert with_table(PAGE.read_text(), rows) == PAGE.read_text(), "run python -m scripts.check_families --table"
    assert list(rows) == [family.model_type for family in FAMILIES.values()]
    assert all(row["largest_difference_of_log_probabilities"] < 1e-3 for row in rows.values())
    assert all(row["tokens_that_transformers_chooses"] == "64 of 64" for row in rows.values())
