"""Pictures become neighbours: sources, embeddings, index, query, page.

The public function `modeling_udon.search` shares its name with this folder, so the folder can be called.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_FUNCTION = "search_images", "modeling_udon.search.query"


class _CallableFolder(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name, module = _FUNCTION
        return getattr(import_module(module), name)(*arguments, **options)


sys.modules[__name__].__class__ = _CallableFolder
