"""What a reader finds in a figure."""

import matplotlib.text
from matplotlib.figure import Figure


def texts(figure: Figure) -> list[str]:
    return [each.get_text() for each in figure.findobj(matplotlib.text.Text)]
