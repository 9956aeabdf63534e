"""Names for files and patients that cannot be turned back.

Items and sites: the key is a digest of the data set's own files, so that nobody without the files can try out names,
and the same files get the same names in every run. Adding, removing or changing a file renames all.

Patients: the key is random and new in every process, so that one patient has one name in all data sets of an audit and
none outside of it. Patients only serve to split and are never written.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from medpfl.core.errors import DataError

_HEAD = 1 << 16
_OF_THIS_PROCESS = secrets.token_bytes(32)


def derive_key(paths: Iterable[Path]) -> bytes:
    """32 bytes from the size and the first 64 KiB of each file, whatever the files are called.

    DICOM files begin with unique identifiers, images and volumes with pixels, so the key has far more possible
    values than anybody can try. Raises DataError if a file cannot be read.
    """
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD)
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror}") from None
        digests.append(hashlib.sha256(size.to_bytes(8, "big") + head).digest())
    return hashlib.sha256(b"".join(sorted(digests))).digest()


def pseudonym(key: bytes, kind: str, text: str) -> str:
    """Twelve hexadecimal digits: HMAC-SHA256 of `text`, separate for each `kind` (item, site).

    >>> pseudonym(b"key", "site", "Clinic") == pseudonym(b"key", "site", "Clinic")
    True
    >>> pseudonym(b"key", "site", "Clinic") == pseudonym(b"other", "site", "Clinic")
    False
    """
    return hmac.new(key, f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()[:12]


def patient_key(text: str, within: Path | None = None) -> str:
    """Opaque name of the patient who is called `text`, the same in all data sets of this process.

    within: folder or file inside which only `text` means somebody, None where it does so everywhere (a patient id).

    >>> patient_key("MR-0815") == patient_key("MR-0815") != patient_key("MR-0816")
    True
    >>> patient_key("sub-01", Path("one")) == patient_key("sub-01", Path("other"))
    False
    """
    scope = "" if within is None else str(within.resolve())
    return pseudonym(_OF_THIS_PROCESS, f"patient\0{scope}", text)
