"""What is not looked at where an optional dependency is missing: importing it says how to install that."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {"flower/*": "flwr", "flare/*": "nvflare", "monai.py": "monai"}
"""Files of integrations -> the package that they need."""

collect_ignore_glob = [
    f"src/medpfl/integrations/{files}" for files, package in NEEDED.items() if find_spec(package) is None
]
