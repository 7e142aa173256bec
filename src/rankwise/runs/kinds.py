"""Values in the files of runs, as types that pydantic checks on reading: nothing passes for another kind of value."""

from typing import Annotated

from pydantic import Field, Strict

Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, le=2**53)]
"""At most what a float holds exactly: counts are averaged and plotted."""
Amount = Annotated[float, Strict(), Field(ge=0, le=1e18)]
