"""Readers, data sets in memory, and who is a victim. Importing this registers all readers."""

from __future__ import annotations

from medpfl.data.auxiliary import Borrowed, borrow
from medpfl.data.base import READERS, UNLABELED, Reader
from medpfl.data.dataset import Dataset, load_dataset
from medpfl.data.named import DATASETS, NamedDataset, check_named
from medpfl.data.near_duplicates import near_duplicates_of
from medpfl.data.paths import require_path, resolve_path
from medpfl.data.readers.csv import CsvReader
from medpfl.data.readers.dicom import DicomReader
from medpfl.data.readers.folder import FolderReader
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.data.readers.nifti import NiftiReader
from medpfl.data.readers.phantom import PhantomReader
from medpfl.data.resizing import Aspect, resize, to_channels
from medpfl.data.splitting import Split, split

__all__ = [
    "DATASETS",
    "READERS",
    "UNLABELED",
    "Aspect",
    "Borrowed",
    "CsvReader",
    "Dataset",
    "DicomReader",
    "FolderReader",
    "MedMnistReader",
    "NamedDataset",
    "NiftiReader",
    "PhantomReader",
    "Reader",
    "Split",
    "borrow",
    "check_named",
    "load_dataset",
    "near_duplicates_of",
    "require_path",
    "resize",
    "resolve_path",
    "split",
    "to_channels",
]
