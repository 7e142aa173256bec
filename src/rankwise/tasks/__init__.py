"""The tasks, one file each. To add one, add a file to this folder."""

from rankwise.tasks.base import Evaluation, Scored, Split, Task, subset

__all__ = ["Evaluation", "Scored", "Split", "Task", "build", "registry", "subset"]

build, registry = Task.build, Task.registry
