"""Hooks that stay in force under torch.compile."""

import torch._dynamo


def let_compile_see_hooks() -> None:
    """Make torch.compile distinguish modules with hooks from modules without.

    By default it reuses code compiled for another model of the same class, and so skips this model's hooks if that one
    had none. Code compiled so far is discarded, and compiled again when needed.
    """
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
