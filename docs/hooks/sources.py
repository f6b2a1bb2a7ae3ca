"""Gives the API reference the package as it is installed: one tree, where the checkout has three folders."""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority


@event_priority(100)  # before mkdocstrings looks where its paths lead
def on_config(config: Any) -> Any:
    """Link the folders of `package_dir` in setup.cfg into build/docs_sources, each where its name says."""
    root = Path(config.config_file_path).parent
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["package_dir"].strip().splitlines()
    folders = dict(tuple(part.strip() for part in line.split("=")) for line in lines)
    farm = root / "build" / "docs_sources"
    shutil.rmtree(farm, ignore_errors=True)
    for name, folder in folders.items():
        place = farm.joinpath(*name.split("."))
        if any(other.startswith(name + ".") for other in folders):  # others lie in it: a folder of links
            place.mkdir(parents=True)
            for path in (root / folder).iterdir():
                (place / path.name).symlink_to(path)
        else:
            place.symlink_to(root / folder)
    return config
