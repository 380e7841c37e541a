"""Trains several configs under torchrun, so that one start of the processes serves them all: test_resume.py."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import torch

from lnsdeploy.errors import LNSError
from lnsdeploy.evaluation.shards import processes
from lnsdeploy.training import trainer
from lnsdeploy.training.trainer import config_from_options, train


def main() -> None:
    """The first argument is a file of options by name, the second a folder for the runs; an error ends it."""
    torch.set_num_threads(1)
    # as in conftest.py
    trainer.write_curve = lambda path, *_: Path(path).write_bytes(b"")
    # a shell that starts this in its background has interrupts ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[2])
    with processes() as shards:
        for name, options in json.loads(Path(sys.argv[1]).read_text()).items():
            stop = options.pop("stop", 0)

            def on_step(done: int, steps: int, loss: float, stop: int = stop) -> None:
                if done == stop:
                    # as a signal does, in one process alone
                    signal.raise_signal(signal.SIGINT)

            try:
                train(
                    config_from_options(**options),
                    folder / name,
                    shards=shards,
                    on_step=on_step if stop and not shards.is_first else None,
                )
            except KeyboardInterrupt:
                (folder / f"{name}.{shards.rank}.stopped").write_text("")
            except LNSError as error:
                # the other process waits for the end of this one
                (folder / f"{name}.{shards.rank}.error").write_text(str(error))
                raise


if __name__ == "__main__":
    main()
