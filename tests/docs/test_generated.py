"""The pages that come from the code say all that the code has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import mtz_core
from docs.generated import filled, inside_links, meaning_of, schema_of, settings_page
from flows.cli import app

FILES = ("params.yaml", "fleet.yaml")


def fields(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a settings file with its schema."""
    for block in (schema, *schema["$defs"].values()):
        yield from block["properties"].items()


@pytest.mark.parametrize("file", FILES)
def test_every_setting_says_what_it_means(file: str) -> None:
    schema = schema_of(file)
    for key, field in fields(schema):
        meaning = meaning_of(field, schema)
        assert meaning.endswith("."), f"{key} of {file} has no meaning, or one without an end"
        assert meaning.count("Allowed: ") <= 1


@pytest.mark.parametrize("file", FILES)
def test_the_page_lists_every_setting(file: str) -> None:
    page = filled(f"<!-- settings: {file} -->")
    for key, _ in fields(schema_of(file)):
        assert f"\n| `{key}` | " in page, key


def test_a_row_has_type_default_range_and_meaning() -> None:
    page = settings_page(schema_of("params.yaml"))
    assert "| `threads` | whole number | `1` | 1 or more | Threads of each stage." in page
    assert "| `labels` | number | `0.0` | 0 to 1 | Weight of cross-entropy" in page
    assert "| `name` | text | required | letters, digits" in page
    assert "| `method` | `refit` or `paper` | `refit` | | " in page
    assert "## `match.budget.retrain`, `retrain`\n" in page


def test_the_page_of_commands_has_every_command_and_option() -> None:
    page = filled("<!-- commands -->")

    def check(name: str, command: Any) -> None:
        assert f"## `{name}`\n" in page
        for option in command.params:
            assert all(f"`{text}`" in page for text in option.opts if option.help)
        for inner, each in getattr(command, "commands", {}).items():
            check(f"{name} {inner}", each)

    check("mtz", typer.main.get_command(app))


def test_a_file_of_the_root_comes_with_its_links_turned() -> None:
    page = filled("<!-- file: README.md -->")
    assert "](method.md)" in page and "](../data/README.md)" in page
    assert "](docs/" not in page, "a link still goes by the root's way"


def test_links_that_leave_the_site_lose_their_target() -> None:
    assert inside_links("See [data](../data/README.md#layout) and [fleets](fleets.md).", "operations.md") == (
        "See data and [fleets](fleets.md)."
    )
    assert inside_links("[up](../fleets.md) [gone](../../gone.md)", "benchmarks/fleet.md") == (
        "[up](../fleets.md) [gone](../../gone.md)"
    ), "what exists nowhere stays, so that the strict build names it"


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        filled("<!-- file: MISSING.md -->")


def test_every_page_that_asks_for_something_can_be_filled() -> None:
    for page in Path("docs").rglob("*.md"):
        text = page.read_text()
        if "<!-- " in text and page.name not in ("contributing.md", "changelog.md"):
            assert "<!-- settings" not in filled(text) and "<!-- commands" not in filled(text)


def test_every_public_name_of_the_core_is_documented() -> None:
    pages = "\n".join(page.read_text() for page in Path("docs/reference").glob("*.md"))
    for name in mtz_core.__all__:
        assert f"\n::: mtz_core.{name}\n" in pages, name
