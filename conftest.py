"""What is not looked at where an optional dependency is missing: importing it says how to install that."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["src/medpfl/integrations/flower/*"]
