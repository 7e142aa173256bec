"""Hooks that stay in force under torch.compile."""

import torch._dynamo


def let_compile_see_hooks() -> None:
    """Make torch.compile tell modules with hooks from those without.

    By default it runs on a model what it compiled for another one of the same class, and so without the hooks of this
    one if that one had none. What was compiled until now is compiled again when it is needed.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
