"""How configurations are declared: frozen, keyword-only pydantic dataclasses that refuse unknown keys.

Every attack, defense, reader and channel is such a class; `medpfl describe` reads its fields.
"""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, use_enum_values=True)
"""Passed as `config=` to `pydantic.dataclasses.dataclass` by every configuration in the project."""
