"""`medpfl compare DIR DIR`: the same cells in two audits, image by image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medpfl.cli.texts import printable
from medpfl.metrics.statistics import Interval, paired_difference
from medpfl.report.formatting import decimals, interval
from medpfl.report.loading import load_audit
from medpfl.report.views import Audit, ImageResult, Measured

Key = tuple[str, str, str, int]
Pair = tuple[ImageResult, ImageResult]


@dataclass(frozen=True)
class CellDifference:
    """Second minus first audit, over the images that both have: means with 95 % intervals over victims."""

    cell: str
    images: int
    victims: int
    psnr: Interval
    ssim: Interval
    success: Interval


@dataclass(frozen=True)
class UtilityDifference:
    """What a cell's model is worth in the first and in the second audit, with 95 % intervals; not paired."""

    cell: str
    measure: str
    first: Measured
    second: Measured


@dataclass(frozen=True)
class Comparison:
    """What two audits have in common and what differs. `not_comparable` has a reason for each cell."""

    cells: tuple[CellDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    not_comparable: Mapping[str, str] = field(default_factory=dict)
    utility: tuple[UtilityDifference, ...] = ()
    warnings: tuple[str, ...] = ()


def register(app: typer.Typer) -> None:
    """Adds `compare`."""
    app.command("compare")(compare)


def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of an audit", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of another audit", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="write JSON to standard output instead of text")] = False,
) -> None:
    """Compare the cells that two audits share: second minus first, with 95 % intervals over victims.

    \b
    Examples:
      medpfl compare out/before out/after
      medpfl compare out/before out/after --json
    """
    found = comparison(load_audit(first), load_audit(second))
    if as_json:
        written = {"first": str(first), "second": str(second), **asdict(found)}
        typer.echo(json.dumps(written, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for warning in found.warnings:
        console.print(Text(f"Warning: {warning}"))
    if found.cells:
        console.print(Text(f"{printable(str(second))} minus {printable(str(first))}, 95 % intervals over victims"))
        table = Table("cell", "images", "victims", "PSNR (dB)", "SSIM", "success", box=None, pad_edge=False)
        for cell in found.cells:
            shown = (_shown(cell.psnr, 2), _shown(cell.ssim, 3), _shown(cell.success, 3))
            texts = (printable(cell.cell), str(cell.images), str(cell.victims), *shown)
            table.add_row(*(Text(text, overflow="fold") for text in texts))
        console.print(table)
    else:
        console.print(Text("The two audits have no comparable cell in common."))
    if found.utility:
        _print_utility(console, found.utility)
    for title, names in ((f"Only in {first}", found.only_first), (f"Only in {second}", found.only_second)):
        if names:
            console.print(Text(f"\n{printable(title)}:"))
            for name in names:
                console.print(Text(f"  {printable(name)}"), soft_wrap=True)
    if found.not_comparable:
        console.print(Text("\nIn both, but not comparable:"))
        for name, reason in found.not_comparable.items():
            console.print(Text(f"  {printable(name)}: {reason}"), soft_wrap=True)


def comparison(first: Audit, second: Audit) -> Comparison:
    """Pairs images by cell, seed, victim, client and position.

    PSNR and SSIM are compared where both audits have them; success everywhere, a failed or blocked image being no
    success, as in the success rate.
    """
    left = {cell.id: cell.results for cell in first.cells}
    right = {cell.id: cell.results for cell in second.cells}
    cells: list[CellDifference] = []
    not_comparable: dict[str, str] = {}
    for name in sorted(left.keys() & right.keys()):
        pairs = _pairs(left[name], right[name])
        if not pairs:
            empty = not left[name] or not right[name]
            not_comparable[name] = (
                "no results (refused or not run yet) in one of them" if empty else "no victim in common"
            )
        elif any(a.item != b.item for a, b in pairs if a.item and b.item):
            not_comparable[name] = "the victims' images differ"
        else:
            cells.append(_difference(name, pairs))
    warnings = []
    if first.threshold != second.threshold:
        warnings.append(
            f"success means SSIM >= {first.threshold:g} in the first and >= {second.threshold:g} in the second"
        )
    for which, audit in (("first", first), ("second", second)):
        if not audit.finished:
            warnings.append(f"the {which} audit is not finished")
    return Comparison(
        utility=_utility(first, second),
        cells=tuple(cells),
        only_first=tuple(sorted(left.keys() - right.keys())),
        only_second=tuple(sorted(right.keys() - left.keys())),
        not_comparable=not_comparable,
        warnings=tuple(warnings),
    )


def _utility(first: Audit, second: Audit) -> tuple[UtilityDifference, ...]:
    """Cells whose utility both audits measured; the same federations give the same numbers."""
    left = {cell.id: cell.utility for cell in first.cells}
    return tuple(
        UtilityDifference(cell.id, name.removeprefix("utility_"), left[cell.id][name], measured)
        for cell in second.cells
        for name, measured in cell.utility.items()
        if name in left.get(cell.id, {})
    )


def _print_utility(console: Console, found: Sequence[UtilityDifference]) -> None:
    console.print(Text("\nUtility of the models that are trained so, first and second"))
    table = Table("cell", "measure", "first", "second", box=None, pad_edge=False)
    for one in found:
        shown = (f"{decimals(side.value, 3)} ({interval(side, 3)})" for side in (one.first, one.second))
        texts = (printable(one.cell), one.measure.replace("_", " "), *shown)
        table.add_row(*(Text(text, overflow="fold") for text in texts))
    console.print(table)


def _pairs(left: Sequence[ImageResult], right: Sequence[ImageResult]) -> list[Pair]:
    others = {_key(result): result for result in right}
    return [(result, others[_key(result)]) for result in left if _key(result) in others]


def _key(result: ImageResult) -> Key:
    return (result.seed, result.victim, result.client, result.position)


def _difference(name: str, pairs: Sequence[Pair]) -> CellDifference:
    psnr = [(a, a.psnr, b.psnr) for a, b in pairs if a.psnr is not None and b.psnr is not None]
    ssim = [(a, a.ssim, b.ssim) for a, b in pairs if a.ssim is not None and b.ssim is not None]
    success = [(a, float(a.success is True), float(b.success is True)) for a, b in pairs]
    return CellDifference(
        cell=name,
        images=len(pairs),
        victims=len({_victim(a) for a, _ in pairs}),
        psnr=_paired(psnr),
        ssim=_paired(ssim),
        success=_paired(success),
    )


def _paired(values: Sequence[tuple[ImageResult, float, float]]) -> Interval:
    victims = [_victim(result) for result, _, _ in values]
    return paired_difference([b for _, _, b in values], [a for _, a, _ in values], victims, seed=0)


def _victim(result: ImageResult) -> str:
    return f"s{result.seed}/v{result.victim}"


def _shown(interval: Interval, digits: int) -> str:
    if interval.mean is None:
        return "-"
    mean = f"{interval.mean:+.{digits}f}"
    if interval.low is None or interval.high is None:
        return mean
    return f"{mean} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
