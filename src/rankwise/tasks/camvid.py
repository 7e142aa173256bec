"""CamVid (Brostow et al. 2009): films of the road from a car; the splits and classes of SegNet (2015).

`RANKWISE_DATA/segmentation/camvid/<split>.parquet` with the columns `id`, `image` and `mask`. An id is the name of a
film and the number of a picture in it. The films are domains: 0001TP was taken at dusk, the others by day.
"""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.errors import need
from rankwise.tasks.base import Split
from rankwise.tasks.segmentation import Segmentation
from rankwise.tasks.source import Origin, checked

CAMVID = Origin("CamVid", "segmentation/camvid", "")
ROWS = {"train": 367, "validation": 101, "test": 233}
DUSK = "0001TP"


@dataclass(frozen=True)
class CamVid(Segmentation, name="camvid"):
    """The class of each pixel of a picture from a car: 11 classes such as road, sky, cars, trees. Dice and IoU."""

    labels = (
        *("sky", "building", "pole", "road", "pavement", "tree"),
        *("sign", "fence", "car", "pedestrian", "bicyclist"),
    )
    film: ClassVar[str] = ""
    """The films to use: `dusk`, `day`, or all of them."""

    height: int = 192
    width: int = 256

    def train(self) -> Split:
        return self._split("train")

    def evaluation(self) -> list[Split]:
        return [self._split("validation")]

    def _split(self, name: str) -> Split:
        datasets = need("datasets", "bench")
        pa = need("pyarrow", "bench")
        compute = need("pyarrow.compute", "bench")
        rows = CAMVID.read(name)
        table = checked(rows, {"id": pa.string(), "image": pa.binary(), "mask": pa.binary()})
        note = rows.note(name, ROWS[name])
        if self.film:
            dusk = compute.starts_with(table["id"], DUSK)
            table = table.filter(dusk if self.film == "dusk" else compute.invert(dusk))
            note = f"the {table.num_rows} rows of {rows.split} at {self.film}, a split by rankwise"
        elif not note:
            note = "resized to 256×192, so not to be compared with published numbers"
        table = table.append_column("idx", pa.array(range(table.num_rows), pa.int64()))
        table = table.append_column("where", compute.binary_join_element_wise(rows.where, table["id"], ", "))
        return Split(rows.split, datasets.Dataset(table), False, note)


@dataclass(frozen=True)
class CamVidDay(CamVid, name="camvid-day"):
    """CamVid's films by day, to train a network before it is adapted. Dice and IoU."""

    film = "day"


@dataclass(frozen=True)
class CamVidDusk(CamVid, name="camvid-dusk"):
    """CamVid's film at dusk: 62 pictures to train on, and the next 62 to score. Dice and IoU."""

    film = "dusk"

    def evaluation(self) -> list[Split]:
        return [self._split("test")]
