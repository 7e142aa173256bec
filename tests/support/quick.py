"""Skips work that takes time and that no test can see. Imported by conftest.py and by the processes that fork."""

import functools
import gc
import os

import jinja2

# Waiting for the disk only matters in a power cut, which no test has; on a busy disk it takes seconds.
os.fsync = os.fstat  # type: ignore[assignment]
# PEFT compiles the template of its model card at every save.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]
gc.set_threshold(20_000, 20, 20)
