"""What takes time and no test can see is left out; imported by conftest.py, and by what processes are forked from."""

import functools
import gc
import os

import jinja2

# Waiting for the disk is for a power cut, which no test brings about; with much being written it can take seconds.
os.fsync = os.fstat  # type: ignore[assignment]
# PEFT compiles the template of its model card at every save.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]
gc.set_threshold(20_000, 20, 20)
