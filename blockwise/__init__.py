"""The machinery behind the scripts. Importing it registers LLaDA with transformers: its Auto classes load checkpoints.

torch and transformers take seconds to import, and a mistyped flag is reported without waiting for them. So, if
transformers is not imported yet, LLaDA is registered as soon as it is.
"""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder


class RegisterAfterImport(MetaPathFinder):
    """Imports blockwise.models.llada, which registers the model type, right after transformers."""

    def find_spec(self, name, path, target=None):
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        run_module = spec.loader.exec_module

        def run_and_register(module):
            run_module(module)
            import_module("blockwise.models.llada")

        spec.loader.exec_module = run_and_register
        return spec


if "transformers" in sys.modules:
    import_module("blockwise.models.llada")
else:
    sys.meta_path.insert(0, RegisterAfterImport())
