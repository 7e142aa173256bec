"""The commented file that someone's own experiment starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import InputError, nearest
from rankwise.files import write_new
from rankwise.settings.yaml_files import in_line

TYPES = {"classification": "label", "pair": "label", "regression": "label", "seq2seq": "target", "causal": "target"}
"""Type of a task on texts -> the role of the column that is learnt."""
IMAGES = "segmentation"
"""The type of a task on images and their masks."""
CHATS = {"chat": ("messages", "conversations"), "instruct": ("completion", "output"), "text": ()}
"""Types whose columns are found by their names -> columns by which a file is taken for one."""
MODELS = {"seq2seq": "t5-small", "causal": "gpt2-medium"}
"""What a file starts with where the packaged model cannot do the task."""

Ask = Callable[[str], str]
"""Puts a question and gives the answer, empty for none."""


@dataclass(frozen=True)
class Start:
    """What the file is about.

    Attributes:
        data: a file, a folder with a file for each split, or a name on the hub.
        type: of the task, one of `TYPES` or `CHATS`, or `IMAGES`.
        read: the columns that the model reads: two for a pair, none for images and `CHATS`, else one.
        answer: the column that it learns; for images the classes, separated by commas; "" for `CHATS`.
        model: folder or hub name; empty for the packaged one.
    """

    data: str
    type: str
    read: Sequence[str]
    answer: str
    model: str = ""

    def __post_init__(self) -> None:
        known = (*TYPES, *CHATS, IMAGES)
        if self.type not in known:
            raise InputError(f"--type {self.type}: no such type{nearest(self.type, known)}; known: {', '.join(known)}")
        wanted = 2 if self.type == "pair" else 0 if self.type in (*CHATS, IMAGES) else 1
        if len(self.read) != wanted:
            columns = "two columns, as in --text question,answer" if wanted == 2 else "one column"
            raise InputError(f"--text {','.join(self.read)}: {self.type} reads {columns}")

    @property
    def columns(self) -> dict[str, str]:
        """Role of each column -> its name."""
        return dict(zip(("text", "text_pair"), self.read, strict=False)) | {TYPES[self.type]: self.answer}

    def text(self, file: Path) -> str:
        """The file's content."""
        start = f"""\
# Which method is worth it on this data? Check the file, see what it means, then run it:
#   rankwise validate {file}
#   rankwise data {file}
#   rankwise compare {file} --dry-run
#   rankwise compare {file}
"""
        if self.type in CHATS:
            return start + self._of_chats()
        return start + (self._of_images() if self.type == IMAGES else self._of_texts())

    def _of_chats(self) -> str:
        own = "  # template: my.jinja  # a chat template of your own, instead of the tokenizer's\n"
        answers, longer = (
            ("tokens", "") if self.type == "text" else ("answers", "; longer rows are cut after an answer")
        )
        return f"""
task:
  type: {self.type}
  # a .csv, .json(l) or .parquet file, of which a tenth is held out to score, or a folder with train and validation
  dataset: {in_line(self.data)}
{"" if self.type == "text" else own}
# a decoder: a folder, a GGUF file or a hub name
model: {in_line(self.model or "smollm2")}
max_length: 512  # tokens of a row{longer}
batch_size: 16  # rows in one optimizer step
micro_batch: 4  # rows at once: fewer need less memory and give the same result
epochs: 1  # passes over the training rows
# train_rows: 1000  # fewer rows, to try things out
""" + self._compared(
            "{name: none, learning_rate: [1e-3]}  # the model as it comes",
            "[1e-4, 3e-4, 1e-3]",
            f"perplexity of the {answers}",
        )

    def _compared(self, lower_bound: str, rates: str, title: str) -> str:
        """The methods, the learning rates that are tried, and the title."""
        first = f"    - {lower_bound}\n" if lower_bound else ""
        return f"""
vary:
  seed: [0, 1, 2]  # fewer than three seeds tell hardly anything apart
  method:
{first}\
    - {{name: lora, rank: 8}}  # the same rank on every layer: what the others are measured against
    - {{name: simplex-lora, rank: 8}}  # as many parameters, on the layers that a search finds worth it

# The learning rate of each method is chosen on training rows that are held out, before anything is reported.
tune:
  learning_rate: {rates}

report:
  title: {in_line(f"{Path(self.data).stem}: {title}")}
"""

    def _of_images(self) -> str:
        methods = """\
  method:
    - {name: full}  # all weights: what the others are measured against
    - {name: lora, rank: 4, targets: [bottleneck, conv1, conv2]}  # the same rank on every layer
    - {name: simplex-lora, rank: 4, targets: [bottleneck, conv1, conv2]}  # rank where a search finds it useful
"""
        network = (
            "# an untrained network trains all of its weights; init --model FOLDER adapts a saved one\nmethod: full"
        )
        if self.model:
            network = f"# the folder of a saved network\nmodel: {in_line(self.model)}"
        return f"""
task:
  type: {self.type}
  # a folder with train/images, train/masks, validation/images and validation/masks, or with parquet files
  dataset: {in_line(self.data)}
  names: {in_line(_words(self.answer))}  # the classes in the order of their numbers in the masks
  height: 256  # images and masks are resized to this, in pixels
  width: 256

{network}
batch_size: 8  # images in one optimizer step
epochs: 30  # passes over the training images
# train_rows: 100  # fewer images, to try things out

vary:
  seed: [0, 1, 2]  # fewer than three seeds tell hardly anything apart
{methods if self.model else "  model: [unet, unet-refined]" + chr(10)}
# The learning rates are chosen on training images that are held out, before anything is reported.
tune:
  learning_rate: [1e-3, 3e-3, 1e-2]

report:
  title: {in_line(f"{Path(self.data).stem}: {', '.join(_words(self.answer))}")}
  reference: full
"""

    def _of_texts(self) -> str:
        scored = self.type in ("classification", "pair", "regression")
        head = "{name: head, learning_rate: [3e-3, 1e-2, 3e-2]}  # the head alone: what no adapter at all gives"
        first = {"regression": "mean_absolute_error, pearson"}.get(self.type, "f1_macro, accuracy")
        metrics = (
            f"  # metrics: [{first}]  # instead of the usual scores; runs are compared by the first\n" if scored else ""
        )
        model = self.model or MODELS.get(self.type, "")
        return f"""
task:
  type: {self.type}
  # a .csv, .json(l) or .parquet file, of which a tenth is held out to score, or a folder with train and validation
  dataset: {in_line(self.data)}
  columns: {in_line(self.columns)}
{metrics}
# a folder or a hub name{"; without it the small MiniLM of rankwise[demo]" if scored else ""}
{"model: " + in_line(model) if model else "# model: roberta-base"}
max_length: 128  # tokens; longer texts are cut
batch_size: 32  # rows in one optimizer step
epochs: 3  # passes over the training rows
# train_rows: 1000  # fewer rows, to try things out
""" + self._compared(head if scored else "", "[3e-4, 1e-3, 3e-3]", f"{', '.join(self.read)} to {self.answer}")

    def write(self, file: Path) -> None:
        """Write the file. Raises InputError if there is one already, or none can be."""
        write_new(file, self.text(file), "rankwise init FILE")


def asked(given: dict[str, str | None], ask: Ask | None) -> Start:
    """The start that flags describe; what they leave out is asked.

    Args:
        given: `data`, `type`, `text`, `label` and `model`, None or empty for what was not given.
        ask: None without a terminal.

    Raises:
        InputError: data without such a column, or a flag that is missing without a terminal.
    """

    def answer(key: str, question: str, usual: str = "") -> str:
        if found := given.get(key):
            return found
        if ask is None:
            raise InputError(f"--{key}: is missing, and there is no terminal to ask on")
        found = ask(f"{question}{f' [{usual}]' if usual else ''} ").strip() or usual
        if not found:
            raise InputError(f"--{key}: is needed; nothing was answered")
        return found

    data = answer("data", "Your data, a .csv, .json(l) or .parquet file, or a folder with train and validation:")
    images = (Path(data).expanduser() / "train" / "images").is_dir()
    columns = [] if images else _columns(data)
    kinds = ", ".join((*TYPES, *CHATS, IMAGES))
    likely = next((kind for kind, names in CHATS.items() if {*names} & {*columns}), "classification")
    kind = answer("type", f"What is to be learnt, {kinds}?", IMAGES if images else likely)
    if kind == IMAGES:
        if not images and not {"image", "mask"} <= {*columns}:
            raise InputError(f"--type {kind}: {data} has neither train/images nor the columns image and mask")
        classes = answer("label", "Which classes, in the order of their numbers in the masks?", "background,foreground")
        return Start(data, kind, (), classes, given.get("model") or "")
    if kind in CHATS:
        return Start(data, kind, (), "", given.get("model") or "")
    columns = columns or _columns(data)
    usual = ",".join(columns[: 2 if kind == "pair" else 1])
    read = _words(answer("text", f"Read which column of {', '.join(columns)}?", usual))
    left = [column for column in columns if column not in read]
    learnt = answer("label", f"Learn which column of {', '.join(left)}?", next(iter(left), ""))
    for key, column in [*(("text", each) for each in read), ("label", learnt)]:
        if column not in columns:
            raise InputError(
                f"--{key} {column}: no such column in {data}{nearest(column, columns)}; it has {', '.join(columns)}"
            )
    if learnt in read:
        raise InputError(f"--label {learnt}: is read already; the answer needs a column of its own")
    return Start(data, kind, read, learnt, given.get("model") or "")


def _columns(data: str) -> list[str]:
    """The columns of the training rows. Raises InputError if they cannot be read."""
    from rankwise.tasks.source import read

    return list(read(data, "train", texts=()).table.column_names)


def _words(text: str) -> list[str]:
    """The parts between commas."""
    return [word.strip() for word in text.split(",")]
