"""`medpfl filter FACTORY`: audits a privacy filter, any callable that turns an update into what is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from medpfl.cli.texts import printable, wide_console
from medpfl.core.errors import InputError

EXIT_FOUND = 1


def register(app: typer.Typer) -> None:
    """Adds `filter`."""
    app.command("filter")(audit_a_filter)


def audit_a_filter(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="FACTORY",
            help="package.module:name of a function update -> update, of a class with that call, or of what makes one",
            show_default=False,
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="a setting of the filter; as often as needed"),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=0, help="the epsilon that is claimed for it; default: none is claimed")
    ] = None,
    delta: Annotated[float, typer.Option(min=1e-12, max=0.5, help="the delta that is claimed with it")] = 1e-5,
    rounds: Annotated[int, typer.Option(min=1, help="rounds over which the claim is made")] = 1,
    victims: Annotated[int, typer.Option(min=0, help="drawn images that are attacked behind it; 0: no attack")] = 2,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the page as HTML to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="write JSON to standard output instead of text")] = False,
) -> None:
    """Audit a privacy filter: is it applied, what does it leave, and does the claimed epsilon follow from it?

    The filter is called with updates of a small model that was trained on drawn images: as they are, millions of times
    larger, empty, in other number formats, again and again, and with settings that make no sense. It sees no data of
    yours. An update is a mapping of names to PyTorch tensors (or NumPy arrays, if it takes nothing else) with batch
    norm's statistics and counters, as federated platforms have it.

    Exit codes: 0 nothing is wrong, 1 a problem was found, 2 input error.

    \b
    Examples:
      medpfl filter ours.privacy:Noise --set clip=1.0 --epsilon 8 --rounds 20
      medpfl filter ours.privacy:percentile --out filter.html
    """
    from medpfl.audit.filters import Claim, as_plain, audit_filter, load_filter

    subject = load_filter(factory, _settings(settings or []), (Path.cwd(),))
    found = audit_filter(subject, Claim(epsilon, delta, rounds), victims=victims)
    if out is not None:
        from medpfl.report.filter_page import write_filter_page

        write_filter_page(found, out)
    if as_json:
        typer.echo(json.dumps(as_plain(found), indent=2, ensure_ascii=False, default=str))
    else:
        _print(found)
        if out is not None:
            typer.echo(f"Page: {out}")
    raise typer.Exit(0 if found.passed else EXIT_FOUND)


def _settings(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE texts, with values as YAML reads them."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"--set {text}: expected NAME=VALUE, for instance --set clip=1.0")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {text}: the value cannot be read; quote text in '...'") from None
        if isinstance(found[name], str):  # YAML takes 1e-5 for text
            found[name] = _number(found[name])
    return found


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _print(found: Any) -> None:
    console = wide_console()
    console.print(Text(printable(f"{found.name}: {found.verdict}"), style="bold"), soft_wrap=True)
    if found.recognized:
        console.print(Text(printable(f"Recognized: {'; '.join(found.recognized)}.")), soft_wrap=True)
    topic = ""
    for finding in found.findings:
        if finding.topic != topic:
            topic = finding.topic
            console.print(f"\n{topic}")
        style = "bold" if finding.level == "problem" else ""
        console.print(Text(printable(f"  {finding.level}: {finding.sentence}"), style=style), soft_wrap=True)
    rows = [row for row in found.measured.leakage if not row.reason]
    if rows:
        table = Table(
            "attack", "filter", "SSIM", "PSNR dB", "somebody else's image", "images at 0.9", box=None, pad_edge=False
        )
        for row in rows:
            null = f"SSIM {row.null_ssim:.2f}, {row.null_psnr:.1f} dB"
            which = "on" if row.filtered else "off"
            table.add_row(
                row.attack, which, f"{row.ssim:.2f}", f"{row.psnr:.1f}", null, f"{row.successes} of {row.victims}"
            )
        console.print()
        console.print(table)
