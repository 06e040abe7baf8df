"""YAML files, read so that each says one thing, and so that none takes long.

PyYAML takes the later one of two equal keys, follows aliases to lists of any size and nested lists
to the end of Python's stack.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dskd_keras import files
from dskd_keras.errors import InputError

# A configuration with all of its fields has 2,000.
_MOST_BYTES = 100_000
_DEEPEST = 20


def read(field: str, path: Path) -> dict[Any, Any]:
    """Returns the mapping that a YAML file holds.

    Args:
        field: What an error calls the file.
        path: The file.

    Raises:
        InputError: It can't be read, is too large or no YAML, has a key twice, aliases or very deep
            lists, or holds no mapping.
    """
    text = files.read_text(field, path, _MOST_BYTES)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or "it can't be parsed"
        raise InputError(f"{field}: '{path}'{place} should be valid YAML: {reason}.") from None
    except ValueError:
        raise InputError(
            f"{field}: '{path}' should be valid YAML: a number or a date in it can't be."
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{field}: '{path}' should hold fields with their values.")
    return values


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases (*) are not read here", event)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _refused(f"it is nested more than {_DEEPEST} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refused(f"{key.value!r} is given twice", key)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _refused(reason: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=where.start_mark)
