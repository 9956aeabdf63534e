"""A CSV file that lists images with their labels and, where known, patients and sites."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import Sample
from medpfl.core.errors import DataError, suggestion
from medpfl.data.base import READERS, UNLABELED, Label, Reader, pick
from medpfl.data.paths import require_file
from medpfl.data.pixels import read_image_file
from medpfl.data.pseudonyms import derive_key, patient_key, pseudonym

_TRUE = {"1", "1.0", "true", "yes"}
_FALSE = {"0", "0.0", "", "false", "no"}


@plain_dataclass(frozen=True)
class _Row:
    number: int
    path: str
    label: Label
    patient: str
    site: str


@READERS.register(
    "csv",
    summary="a CSV file with a row per PNG or JPEG image: path, label, and where known patient and site",
    limits="paths are relative to the CSV file; the first line names the columns",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class CsvReader(Reader):
    """Reads the images that a CSV file lists, in its order.

    One label column holds a class name, or several joined by `separator`; several label columns hold 0 or 1 each and
    are the classes. Patients and sites leave as keyed pseudonyms; equal texts in two CSV files mean one patient. The item is the path as written, or row and file
    name where that leads out of the CSV file's folder.
    """

    path: Annotated[Path, Field(description="the CSV file")]
    path_column: Annotated[str, Field(description="column with the image's path, relative to the CSV file")] = "path"
    label_column: Annotated[
        str | tuple[str, ...] | None,
        Field(description="column with the class, several columns with 0/1 (multi-label), or null for no labels"),
    ] = "label"
    separator: Annotated[
        str | None, Field(min_length=1, description="splits the label column into several labels, for instance '|'")
    ] = None
    negative: Annotated[str, Field(description="with a separator: text for no label, for instance 'No Finding'")] = ""
    classes: Annotated[tuple[str, ...], Field(description="class names in order; default: those found, sorted")] = ()
    patient_column: Annotated[str | None, Field(description="column with the patient; 'patient' may be absent")] = (
        "patient"
    )
    site_column: Annotated[str | None, Field(description="column with the hospital; 'site' may be absent")] = "site"

    @property
    def multi_label(self) -> bool:
        """True for several label columns or a separator."""
        return isinstance(self.label_column, tuple) or (self.separator is not None and self.label_column is not None)

    def class_names(self) -> tuple[str, ...]:
        """Given classes, label columns, or the labels found (numbers in numerical order)."""
        return self._class_names(self._records())

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """Images in the order of the rows."""
        records = self._records()
        key = derive_key([self.path])
        rows = self._rows(records, self._class_names(records))
        for row in pick(rows, [row.label for row in rows], maximum):
            patient = patient_key(row.patient) if row.patient else None
            site = pseudonym(key, "site", row.site) if row.site else None
            yield Sample(read_image_file(self._file(row)), row.label, self._item(row), patient, site)

    def _records(self) -> list[dict[str, str]]:
        require_file(self.path, "CSV")
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file, strict=True, restval="")
                columns = list(table.fieldnames or ())
                records = list(table)
        except UnicodeDecodeError:
            raise DataError(f"'{self.path}' is no text in UTF-8; save it with that encoding") from None
        except (OSError, csv.Error) as error:
            raise DataError(f"'{self.path}' is not a readable CSV file ({error}); write it anew") from None
        if not records:
            raise DataError(f"'{self.path}' has no rows; expected a line of column names and one line per image")
        wide = next((number for number, record in enumerate(records, start=2) if None in record), None)
        if wide is not None:
            raise DataError(f"'{self.path}', row {wide}: more fields than columns; quote fields that contain a comma")
        twice = next((column for column in columns if columns.count(column) > 1), None)
        if twice is not None:
            raise DataError(f"'{self.path}' has the column '{twice}' more than once; rename all but one")
        if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
            raise DataError(f"'{self.path}' has one column only, '{columns[0]}'; separate its columns by commas")
        for column in self._required_columns():
            if column not in columns:
                raise DataError(f"'{self.path}' has no column '{column}': {suggestion(column, columns)}")
        return records

    def _required_columns(self) -> list[str]:
        labels = (self.label_column,) if isinstance(self.label_column, str) else self.label_column or ()
        chosen = [
            column
            for column, default in ((self.patient_column, "patient"), (self.site_column, "site"))
            if column is not None and column != default
        ]
        return [self.path_column, *labels, *chosen]

    def _class_names(self, records: Sequence[dict[str, str]]) -> tuple[str, ...]:
        if isinstance(self.label_column, tuple):
            return self.label_column
        if self.classes:
            return self.classes
        if self.label_column is None:
            return (UNLABELED,)
        found = {name for record in records for name in self._names(record)}
        names = sorted(found, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
        if not names:
            raise DataError(f"'{self.path}': column '{self.label_column}' is empty; give label_column: null instead")
        return tuple(names)

    def _names(self, record: dict[str, str]) -> list[str]:
        """The labels in the one label column of a row."""
        text = record[str(self.label_column)].strip()
        parts = [text] if self.separator is None else [part.strip() for part in text.split(self.separator)]
        return [part for part in parts if part and (self.separator is None or part != self.negative)]

    def _rows(self, records: Sequence[dict[str, str]], classes: tuple[str, ...]) -> list[_Row]:
        return [
            _Row(
                number=number,
                path=record[self.path_column].strip(),
                label=self._label(record, classes, f"'{self.path}', row {number}"),
                patient=record.get(self.patient_column or "", "").strip(),
                site=record.get(self.site_column or "", "").strip(),
            )
            for number, record in enumerate(records, start=2)
        ]

    def _label(self, record: dict[str, str], classes: tuple[str, ...], where: str) -> Label:
        if self.label_column is None:
            return 0
        if isinstance(self.label_column, tuple):
            return tuple(_flag(record[column], column, where) for column in self.label_column)
        names = self._names(record)
        for name in names:
            if name not in classes:
                raise DataError(f"{where}: unknown label '{name}': {suggestion(name, classes)}")
        if self.separator is not None:
            return tuple(int(name in names) for name in classes)
        if not names:
            raise DataError(f"{where}: column '{self.label_column}' is empty; every image needs a label")
        return classes.index(names[0])

    def _file(self, row: _Row) -> Path:
        if not row.path:
            raise DataError(f"'{self.path}', row {row.number}: column '{self.path_column}' is empty")
        path = self.path.parent / row.path
        if not path.is_file():
            raise DataError(f"'{self.path}', row {row.number}: there is no file '{path}'; paths start at the CSV file")
        return path

    def _item(self, row: _Row) -> str:
        path = PurePath(row.path)
        return f"row-{row.number}/{path.name}" if path.is_absolute() or ".." in path.parts else path.as_posix()


def _flag(text: str, column: str, where: str) -> int:
    value = text.strip().lower()
    if value not in _TRUE | _FALSE:
        raise DataError(f"{where}: column '{column}' holds '{text}'; expected 0 or 1")
    return int(value in _TRUE)
