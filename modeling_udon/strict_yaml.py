"""YAML as configs are read: no key twice, no aliases, no deep nesting, plain values only."""

from typing import Any

import yaml

# Sections, their values and the backbone's own are a few levels; the rest is no config.
MAX_DEPTH = 32


class _StrictLoader(yaml.SafeLoader):
    """Refuses what PyYAML lets pass in silence, or what would grow without bound."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a value with all below it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            # A few lines of them can stand for billions of values, or for a value within itself.
            raise _error(event, f"the alias *{event.anchor} must be written out")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(event, f"values must be nested at most {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Composes a mapping; PyYAML would take the last of equal keys."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _error(key, f"the key `{key.value}` is given twice; remove one")
                seen.add(key.value)
        return node


def load_strict(text: str) -> Any:
    """Reads YAML of one document.

    Raises:
        yaml.YAMLError: If it is no YAML, or has a key twice, aliases, tags of other than plain values, or too many
            levels.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        # What PyYAML's own constructors let out: the 31st of February, or `!!int x`.
        raise yaml.YAMLError(f"a value cannot be read: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _error(where: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)
