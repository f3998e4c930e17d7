"""The options of programs: what the agents `command` and `command+json` give them."""

from __future__ import annotations

import click

from runlane_server.config.option_types import Duration, Size, Variables

_NOT_SET = "what the server has"

COMMAND = (
    click.option(
        "--command-env",
        type=Variables(),
        multiple=True,
        metavar="NAME,...|NAME=VALUE",
        help="What a program has in its environment, besides PATH, LANG, LC_*, TZ and what it is "
        "told of its run: a variable of the server, or one with this value. May be repeated.",
        show_default="nothing of the server's",
    ),
    click.option(
        "--command-dir",
        type=click.Path(file_okay=False),
        metavar="DIR",
        help="Where each run of a program gets a private directory, which is removed after it.",
        show_default="the directory for temporary files",
    ),
    click.option(
        "--command-cwd",
        type=click.Path(file_okay=False, exists=True),
        metavar="DIR",
        help="Where all programs work. HOME and TMPDIR are private all the same.",
        show_default="the private directory of the run",
    ),
    click.option(
        "--command-cpu",
        type=Duration(),
        default=0.0,
        help="How much CPU time each process of a program may take, in whole seconds.",
        show_default=_NOT_SET,
    ),
    click.option(
        "--command-memory",
        type=Size(),
        default=0,
        help="How large the address space of each process of a program may be.",
        show_default=_NOT_SET,
    ),
    click.option(
        "--command-files",
        type=click.IntRange(min=0),
        default=0,
        help="How many files each process of a program may have open.",
        show_default=_NOT_SET,
    ),
    click.option(
        "--command-processes",
        type=click.IntRange(min=0),
        default=0,
        help="How many processes and threads the user of the server may have, all programs and the "
        "server together, when a program starts another one. Does not bind root.",
        show_default=_NOT_SET,
    ),
    click.option(
        "--command-file-size",
        type=Size(),
        default=0,
        help="How large a file may grow that a program writes.",
        show_default=_NOT_SET,
    ),
)
