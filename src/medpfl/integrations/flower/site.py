"""What a site enforces outside the app: whoever writes a Flower app can drop the mods that it lists.

A SuperNode starts the command `flwr-clientapp` for every task. A site that starts `medpfl-flower-clientapp` in its place
puts its own mods around every app that the SuperLink ships, whatever the app lists. `site_folder` makes a folder with such
a command to be put first on the SuperNode's PATH. The mods come from a function that the site names in the environment
variable `MEDPFL_FLOWER_SITE`, `package.module:function`, which returns a list of mods. Without it, or where it raises,
nothing is trained.

What this does not cover: code of the app that talks to the network on its own, or reads other files. The app still runs
as the user whom the site lets it be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from medpfl.core.errors import InputError
from medpfl.models.factories import imported

VARIABLE = "MEDPFL_FLOWER_SITE"

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def enforce(mods: Sequence[Mod]) -> None:
    """From now on every ClientApp of this process runs inside these mods, the first outermost."""
    plain = ClientApp.__call__

    def call(app: ClientApp, message: Message, context: Context) -> Message:
        def inner(message: Message, context: Context) -> Message:
            return plain(app, message, context)

        wrapped: Callable[[Message, Context], Message] = inner
        for mod in reversed(mods):
            wrapped = _around(mod, wrapped)
        return wrapped(message, context)

    ClientApp.__call__ = call


def _around(mod: Mod, inner: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    return lambda message, context: mod(message, context, inner)


def site_mods() -> list[Mod]:
    """The mods of the site's own function. Raises InputError where there is none."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        raise InputError(
            f"{VARIABLE} is not set: name the site's function, package.module:function; nothing is trained"
        )
    found: Any = imported(name, (Path.cwd(),))()
    mods = list(found)
    if not mods or not all(callable(mod) for mod in mods):
        raise InputError(f"{VARIABLE}={name} gave no list of mods; nothing is trained")
    return mods


def site_folder(folder: Path) -> Path:
    """Writes a command `flwr-clientapp` that enforces the site's mods into a folder, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "flwr-clientapp"
    command.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -m medpfl.integrations.flower.site \"$@\"\n", encoding="utf-8"
    )
    command.chmod(0o755)
    return folder


def main() -> None:
    """`flwr-clientapp` with the site's mods around every app."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    try:
        enforce(site_mods())
    except InputError as error:
        sys.exit(f"error: {error}")
    flwr_clientapp()


if __name__ == "__main__":
    main()
