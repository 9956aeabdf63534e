"""Help pages that say what every argument means, whatever the versions of Typer and Click make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import click
from typer.core import TyperCommand
from typer.models import ArgumentInfo


class Command(TyperCommand):
    """A command whose help lists its positional arguments with their texts, and its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes both lists."""
        texts = dict(_argument_texts(self.callback))
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                arguments.append((parameter.make_metavar(ctx), texts.get(parameter.name or "", "")))
            elif (record := parameter.get_help_record(ctx)) is not None:
                options.append((record[0], record[1].replace("\\[", "[")))  # Typer escapes brackets for Rich
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _argument_texts(callback: Callable[..., Any] | None) -> Iterator[tuple[str, str]]:
    """Parameter names of a command's function, with the help that is declared beside their types."""
    for name, annotation in (get_type_hints(callback, include_extras=True) if callback is not None else {}).items():
        for declared in getattr(annotation, "__metadata__", ()):
            if isinstance(declared, ArgumentInfo):
                yield name, declared.help or ""
