"""What a user sees: the one line of an error, the texts of a picture."""

from collections.abc import Callable

import matplotlib.text
import pytest
from matplotlib.figure import Figure

from rankwise.errors import InputError


def refused(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises: one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(figure: Figure) -> list[str]:
    return [each.get_text() for each in figure.findobj(matplotlib.text.Text)]
