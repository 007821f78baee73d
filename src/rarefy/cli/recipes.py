"""`rarefy recipes`: the recipes that come with rarefy, and the schema of all recipes."""

import sys
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Annotated

import typer
from rich.table import Table

from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.errors import guarded
from rarefy.cli.optional import compress_extra
from rarefy.cli.options import DebugFlag, JsonFlag
from rarefy.core.errors import UsageError

app = typer.Typer(
    invoke_without_command=True,
    help="List and show the recipes that come with rarefy; without a command: list.",
    pretty_exceptions_enable=False,
)


def list_by_default(context: typer.Context, as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """List and show the recipes that come with rarefy; without a command: list."""
    if context.invoked_subcommand is None:
        list_recipes(as_json, debug)


def list_recipes(as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """List the recipes that come with rarefy; each name can stand after compress --recipe."""
    del debug
    described = {name: _description(text) for name, text in shipped().items()}
    if as_json:
        write_json([{"name": name, "description": description} for name, description in described.items()])
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, description in described.items():
        table.add_row(name, description)
    stdout_console().print(table)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `rarefy recipes list`.")],
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Print a recipe; save it, change it and give the file to compress --recipe.

    Example:

        rarefy recipes show sparse-50-int4 > mine.yaml
    """
    del debug
    known = shipped()
    if name not in known:
        raise UsageError("recipe", f"no recipe is called {name!r}", allowed=", ".join(known))
    if as_json:
        write_json({"name": name, "description": _description(known[name]), "text": known[name]})
    else:
        sys.stdout.write(known[name])


def schema(as_json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    del as_json, debug
    with compress_extra("recipes schema"):
        from rarefy.recipe.schema import json_schema
    write_json(json_schema())


def shipped() -> dict[str, str]:
    """Return the text of every recipe of the package by its name, in alphabetical order."""
    folder = resources.files("rarefy").joinpath("recipes")
    files: dict[str, Traversable] = {item.name: item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): files[name].read_text(encoding="utf-8") for name in sorted(files)}


def _description(text: str) -> str:
    """Return the comment at the top of a recipe as one line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


app.callback()(guarded(list_by_default))
app.command("list")(guarded(list_recipes))
app.command("show")(guarded(show))
app.command("schema")(guarded(schema))
