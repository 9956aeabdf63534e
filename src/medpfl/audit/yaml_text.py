"""YAML as a spec needs it: plain values only, a key given twice is an error, and errors that say the line."""

from __future__ import annotations

from typing import Any

import yaml

from medpfl.core.errors import SpecError


class _Loader(yaml.SafeLoader):
    """Builds plain values; refuses what plain YAML readers pass over in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' comes twice", key.start_mark
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """The plain values of one YAML document. Raises SpecError that names `where` and the line.

    >>> read_yaml("data: [1, 2]", "a.yaml")
    {'data': [1, 2]}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        reason = error.problem or error.context or "cannot be parsed"
        raise SpecError(f"{where}{line}: not valid YAML: {reason}; `medpfl init` writes a spec to start from") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"{where}: not valid YAML: {reason}; `medpfl init` writes a spec to start from") from None
