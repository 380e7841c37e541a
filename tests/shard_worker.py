"""Runs several requests under torchrun, so that one start of the processes serves them all: test_sharding.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lnsdeploy.evaluation.run import Request, run
from lnsdeploy.evaluation.shards import processes


def main() -> None:
    """Writes a list of results to the second argument; the first is a file of a list of requests."""
    made = []
    with processes() as shards:
        for options in json.loads(Path(sys.argv[1]).read_text()):
            result = run(request(options), shards)
            if result is not None:
                made.append(result.to_dict())
        if shards.is_first:
            Path(sys.argv[2]).write_text(json.dumps(made))


def request(options: dict) -> Request:
    """A request from plain data."""
    paths = {name: Path(options[name]) for name in ("data_dir", "recipe") if options.get(name)}
    return Request(**(options | paths))


if __name__ == "__main__":
    main()
