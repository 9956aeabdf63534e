"""What a site enforces outside the app: whoever writes a Flower app can drop the mods that it lists.

A SuperNode starts the command `flwr-clientapp` for every task. A site that starts `medpfl-flower-clientapp` in its place
puts its own mods around every app that the SuperLink ships, whatever the app lists. `site_folder` makes a folder with such
a command to be put first on the SuperNode's PATH. The mods come from a function that the site names in the environment
variable `MEDPFL_FLOWER_SITE`, `package.module:function`, which returns a list of mods. Without it, or where it raises,
nothing is trained: every message is answered by an error.

What this does not cover: code of the app that talks to the network on its own, reads other files, or changes Flower's
classes in its own process. The app still runs as the user whom the site lets it be. Use `--trusted-entities` beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from medpfl.core.errors import InputError
from medpfl.integrations.flower.records import refused
from medpfl.models.factories import imported, searched_first

VARIABLE = "MEDPFL_FLOWER_SITE"

Call = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Call], Message]


_INSIDE: ContextVar[bool] = ContextVar("medpfl_site_inside", default=False)
"""Whether the site's mods already stand around the call, so that they are not applied twice."""


def enforce(mods: Sequence[Mod]) -> None:
    """From now on every app of this process runs inside these mods, the first outermost.

    They stand around what Flower loads, because an app may bring a ClientApp whose call is its own, and around Flower's
    own ClientApp, should an app be loaded another way. Without mods no app is loaded at all, and every message is
    answered by an error.
    """
    from flwr.supernode.runtime import run_clientapp as runtime

    plain, loader = ClientApp.__call__, runtime.get_load_client_app_fn

    def call(app: ClientApp, message: Message, context: Context) -> Message:
        return _inside(mods, partial(plain, app), message, context)

    def loading(*arguments: Any, **values: Any) -> Callable[..., Call]:
        load = loader(*arguments, **values)
        return lambda *names, **named: partial(_inside, mods, load(*names, **named))

    ClientApp.__call__ = call if mods else lambda _, message, *__, **___: refused(message)
    runtime.get_load_client_app_fn = loading if mods else _loading_nothing


def _inside(mods: Sequence[Mod], app: Call, message: Message, context: Context) -> Message:
    if _INSIDE.get():
        return app(message, context)
    token = _INSIDE.set(True)
    try:
        wrapped = app
        for mod in reversed(mods):
            wrapped = _around(mod, wrapped)
        return wrapped(message, context)
    finally:
        _INSIDE.reset(token)


def _around(mod: Mod, inner: Call) -> Call:
    return lambda message, context: mod(message, context, inner)


def _loading_nothing(*_: Any, **__: Any) -> Callable[..., Call]:
    return lambda *_, **__: _refuse


def _refuse(message: Message, *_: Any, **__: Any) -> Message:
    return refused(message)


def site_mods() -> list[Mod]:
    """The mods of the site's own function. Raises InputError where there is none."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        raise InputError(f"{VARIABLE} is not set: name the site's function, package.module:function")
    with searched_first((Path.cwd(),)):
        mods: list[Any] = list(imported(name, (Path.cwd(),))())
    if not mods or not all(callable(mod) for mod in mods):
        raise InputError(f"{VARIABLE}={name} gave no list of mods")
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
    """`flwr-clientapp` with the site's mods around every app.

    Where they cannot be had no app is loaded and nothing is trained: the server is told that the round is withheld and
    does not wait, and the reason is written to the SuperNode's own output.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    try:
        mods = site_mods()
    except InputError as error:
        reason, mods = str(error), list[Mod]()
    except Exception as error:  # noqa: BLE001  whatever the site's function does, nothing is trained without its mods
        reason, mods = f"{os.environ[VARIABLE]} raised {type(error).__name__}: {error}", list[Mod]()
    else:
        reason = ""
    if reason:
        sys.stderr.write(f"error: {reason}; nothing is trained\n")
    enforce(mods)
    flwr_clientapp()


if __name__ == "__main__":
    main()
