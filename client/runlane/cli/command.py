"""The commands' classes: they refuse arguments that are not UTF-8, before any work."""

from __future__ import annotations

from typing import Any

import click

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


class Command(click.Command):
    """A command whose text arguments are UTF-8. Paths may have any bytes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command. Raises UsageError."""
        refuse_other_encodings(ctx)
        return super().invoke(ctx)


class Group(click.Group):
    """A group with the same rule for its own options and for its commands."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command. Raises UsageError."""
        refuse_other_encodings(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Before or after the calls, as at an editor; click would exit with 1.
            ctx.exit(INTERRUPTED)


def refuse_other_encodings(ctx: click.Context) -> None:
    """Raises UsageError for an argument that is not UTF-8, which no message could carry.

    Python decodes such bytes to lone surrogates.
    """
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        texts = value if isinstance(value, tuple) else (value,)
        for text in texts:
            if isinstance(text, str) and not _is_encodable(text):
                raise click.BadParameter("is not valid UTF-8", ctx, parameter)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
