"""``python -m cluster.deploy``: writes the files that are made from the catalogue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.deploy.files import RUNBOOKS_URL, files


def main(
    output: Annotated[Path, typer.Option(help="Directory to write to.")] = Path(__file__).parent,
    runbooks_url: Annotated[str, typer.Option(help="Where your people read the runbooks.")] = RUNBOOKS_URL,
) -> None:
    """Writes dashboards and alert rules into OUTPUT, over what is there.

    Example: python -m cluster.deploy --output /etc/fi --runbooks-url https://wiki.example/fi/runbooks
    """
    try:
        for name, text in files(runbooks_url).items():
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(path)
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}; choose an --output that can be written")


if __name__ == "__main__":
    typer.run(main)
