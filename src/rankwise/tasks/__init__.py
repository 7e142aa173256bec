"""The tasks: one file each, found by name. A new task is one new file in this folder, nothing edited."""

from rankwise.tasks.base import Evaluation, Scored, Split, Task, subset

__all__ = ["Evaluation", "Scored", "Split", "Task", "build", "registry", "subset"]

build, registry = Task.build, Task.registry
