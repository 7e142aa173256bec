"""What a user is told."""

from collections.abc import Callable

import pytest

from rankwise.errors import InputError


def refused(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises: one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
