"""Names for files and patients that cannot be turned back.

The key is a digest of the data set's own files, so that nobody without the files can try out patient ids or file
names, and the same files get the same names in every run. Adding, removing or changing a file renames all.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from medpfl.core.errors import DataError

_HEAD = 1 << 16


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
    """Twelve hexadecimal digits: HMAC-SHA256 of `text`, separate for each `kind` (item, patient, site).

    >>> pseudonym(b"key", "patient", "Jane") == pseudonym(b"key", "patient", "Jane")
    True
    >>> pseudonym(b"key", "patient", "Jane") == pseudonym(b"other", "patient", "Jane")
    False
    """
    return hmac.new(key, f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()[:12]
