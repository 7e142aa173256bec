"""Pipes, sockets and links in the place of a file."""

import os
import socket
from collections.abc import Callable
from pathlib import Path


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its address may not be long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_circle_of_links(path: Path) -> None:
    path.symlink_to(path.name)


ODD: list[Callable[[Path], None]] = [a_pipe, a_folder, a_socket, a_device, a_circle_of_links]
