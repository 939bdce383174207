"""Importing it registers LLaDA and LLaDA-MoE with transformers' Auto classes; the machinery behind the scripts.

    import blockwise

    model, tokenizer = blockwise.load("ckpts_mine_step0050")
    print(blockwise.generate(model, tokenizer, "What is 3 + 4?", gen_length=16, block_length=8, steps=16))

torch and transformers take seconds to import, and a mistyped flag is reported without waiting for them. So, if
transformers is not imported yet, they are registered as soon as it is.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder


def __getattr__(name: str):
    """load and generate, which are in blockwise/decoding/api.py, once somebody asks for them."""
    if name in ("load", "generate"):
        return getattr(import_module("blockwise.decoding.api"), name)
    raise AttributeError(f"module 'blockwise' has no attribute {name!r}")


class RegisterAfterImport(MetaPathFinder):
    """Imports blockwise.models.llada, which registers the model types, right after transformers."""

    def find_spec(self, name, path, target=None):
        if name != "transformers":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None:  # it is not installed
            return None
        run_module = spec.loader.exec_module

        def run_and_register(module):
            run_module(module)
            if self in sys.meta_path:  # not before, as some only ask whether transformers is installed
                sys.meta_path.remove(self)
            import_module("blockwise.models.llada")

        spec.loader.exec_module = run_and_register
        return spec


if "transformers" in sys.modules:
    import_module("blockwise.models.llada")
else:
    sys.meta_path.insert(0, RegisterAfterImport())
