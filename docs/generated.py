"""What the documentation site takes from the code and from files outside `docs`; a hook of mkdocs.

A page asks for it by a comment on a line of its own: `<!-- settings: params.yaml -->`, `<!-- settings: fleet.yaml -->`,
`<!-- commands -->`, or `<!-- file: CONTRIBUTING.md -->`. Links that leave `docs` lose their target, because the site
has no page there; on a code host they work as they stand.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_COMMENT = re.compile(r"^<!-- (?P<what>settings|commands|file)(?:: (?P<argument>\S+))? -->$", re.MULTILINE)

Schema = Mapping[str, Any]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill a page (called by mkdocs)."""
    return inside_links(filled(markdown), page.file.src_uri)


def filled(markdown: str) -> str:
    """Return the text with every comment replaced by what it asks for. Raises OSError for a file that is missing."""

    def found(comment: re.Match[str]) -> str:
        what, argument = comment["what"], comment["argument"]
        if what == "settings":
            return settings_page(schema_of(argument))
        return commands_page() if what == "commands" else _included(argument)

    return _COMMENT.sub(found, markdown)


def inside_links(markdown: str, source: str) -> str:
    """Return a page's text without the targets of links to files of the project that lie outside `docs`."""

    def kept(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link["target"]))
        outside = "://" not in link["target"] and not target.startswith("docs/")
        return link["text"] if outside and (_ROOT / target.partition("#")[0]).exists() else link[0]

    return _LINK.sub(kept, markdown)


def _included(name: str) -> str:
    """Return a file of the project's root, its links as they are seen from `docs`."""

    def moved(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or target.startswith("#"):
            return link[0]
        return f"[{link['text']}]({posixpath.relpath(target, 'docs')})"

    return _LINK.sub(moved, (_ROOT / name).read_text(encoding="utf-8"))


# --- settings ---


def schema_of(file: str) -> Schema:
    """Return the JSON schema of a settings file."""
    from pydantic import TypeAdapter

    from flows.spec.fleet_file import FleetFile
    from tasks.params import Params

    return TypeAdapter({"params.yaml": Params, "fleet.yaml": FleetFile}[file]).json_schema()


def settings_page(schema: Schema) -> str:
    """Return a table for each block of a settings file, the values at the top first."""
    places: dict[str, list[str]] = {}
    for place, name in _uses(schema):
        places.setdefault(name, []).append(place)
    lines = ["## Top level", "", *_table(schema, schema)]
    for name, found in places.items():
        block = schema["$defs"][name]
        title = ", ".join(f"`{place}`" for place in found)
        lines += ["", f"## {title}", "", block["description"], "", *_table(block, schema)]
    return "\n".join(lines)


def meaning_of(field: Schema, schema: Schema) -> str:
    """Return what a field means; the schema leaves it to the block where both say the same."""
    block: Schema = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
    return " ".join((field.get("description") or block.get("description", "")).split())


def _table(block: Schema, schema: Schema) -> list[str]:
    required = block.get("required", ())
    lines = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for key, field in block["properties"].items():
        meaning, _, said = meaning_of(field, schema).partition(" Allowed: ")
        allowed = _range(field) or said.removesuffix(".")
        default = "required" if key in required else _default(field)
        lines.append(f"| `{key}` | {_type(field)} | {default} | {allowed} | {meaning} |".replace("|  |", "| |"))
    return lines


def _default(field: Schema) -> str:
    """A default in YAML's words; blocks have those of their own keys."""
    value = field.get("default", {})
    if value is None or value == {} or value == []:
        return "none"
    if "$ref" in field:
        return "as below"
    return f"`{value}`" if value and isinstance(value, str) else f"`{json.dumps(value)}`"


_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": ""}


def _type(field: Schema) -> str:
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(filter(None, dict.fromkeys(_type(option) for option in field[key])))
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "block"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        values = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
        of = _type(values[0]) if isinstance(values[0], dict) else "values"
        return "blocks by name" if of == "block" else f"mapping to {of}"
    return _TYPES[field["type"]]


def _range(field: Schema) -> str:
    """The bounds that a schema states for a number, or for the count of a list's items."""
    for option in (field, *field.get("anyOf", ())):
        if "minimum" in option and "maximum" in option:
            return f"{option['minimum']} to {option['maximum']}"
        if "minimum" in option:
            return f"{option['minimum']} or more" + (", or auto" if "anyOf" in field and "auto" in str(field) else "")
        if "exclusiveMinimum" in option:
            return f"above {option['exclusiveMinimum']}"
        if "minItems" in option or "minProperties" in option:
            return f"{option.get('minItems', option.get('minProperties'))} or more"
    return ""


def _uses(schema: Schema, block: Schema | None = None, path: str = "") -> Iterator[tuple[str, str]]:
    """Every place of a file where a block stands, and the block's name."""
    for key, field in (block or schema)["properties"].items():
        where = f"{path}{key}"
        options = [*_options(field)]
        options += [dict(inner, named=True) for o in options for value in _values(o) for inner in _options(value)]
        for option in options:
            if "$ref" in option:
                name = option["$ref"].rpartition("/")[2]
                place = where + (".NAME" if "named" in option else "")
                yield place, name
                yield from _uses(schema, schema["$defs"][name], f"{place}.")


def _options(field: Schema) -> Iterator[Schema]:
    """What a value may be: what the field says, or any of its unions."""
    yield field
    for option in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from _options(option)


def _values(field: Schema) -> list[Schema]:
    values = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    return [value for value in values if isinstance(value, dict)]


# --- commands ---


def commands_page() -> str:
    """Return every command of `mtz` with its options."""
    import typer.main

    from flows.cli import app

    return "\n".join(_command("mtz", typer.main.get_command(app)))


def _command(name: str, command: Any) -> Iterator[str]:
    inner: Mapping[str, Any] = getattr(command, "commands", {})
    yield from (f"## `{name}`", "", command.help or "", "")
    if command.epilog:
        yield from (command.epilog, "")
    options = [option for option in command.params if option.help]
    if options:
        yield from ("| option | default | meaning |", "|---|---|---|")
        for option in options:
            given = ", ".join(f"`{text}`" for text in option.opts)
            value = "" if option.is_flag or not option.metavar else f" {option.metavar}"
            default = "required" if option.required else _shown(option.default)
            yield f"| {given}{value} | {default} | {option.help} |"
        yield ""
    for each in inner:
        yield from _command(f"{name} {each}", inner[each])


def _shown(default: object) -> str:
    return "" if default is None or isinstance(default, bool) else f"`{default}`"
