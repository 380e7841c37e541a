"""An exported model over a test set, by many processes: the figures of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.executor import Executor
from lnsdeploy.emulator.session import Emulation, emulate
from lnsdeploy.errors import BadValueError
from lnsdeploy.evaluation.shards import Shards

_COUNTS = ("macs", "words", "saturated", "flushed")


def emulate_exported(
    artifact: Artifact,
    executor: Executor,
    x: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None,
    *,
    batch: int = 64,
    shards: Shards | None = None,
    progress: Callable[[int], None] | None = None,
) -> Emulation | None:
    """Run an exported model, each process its batches.

    Args: as :func:`~lnsdeploy.emulator.session.emulate`.
        shards: the processes; one by default.
    Returns: the result in the first process, None in the others.

    Raises:
        BadValueError: no samples.
    """
    shards = shards or Shards()
    if shards.world == 1:
        return emulate(artifact, executor, x, labels, batch=batch, progress=progress)
    if len(x) == 0:
        raise BadValueError("emulation needs samples, and there are none")
    # sample i is in batch i // batch, and batches are dealt out in turn
    turns = np.arange(len(x)) // batch % shards.world
    shares = [np.flatnonzero(turns == rank) for rank in range(shards.world)]
    mine = shares[shards.rank]
    show = progress if shards.is_first else None

    def run() -> Emulation | None:
        if not len(mine):
            return None
        own = None if labels is None else labels[mine]
        return emulate(artifact, executor, x[mine], own, batch=batch, progress=show)

    told = shards.gather(shards.together(run))
    parts = [(share, part) for share, part in zip(shares, told, strict=False) if part is not None]
    if not shards.is_first:
        return None
    first = parts[0][1]
    return replace(
        first,
        accuracy=None
        if labels is None
        else round(sum((part.accuracy or 0) * part.samples for _, part in parts)) / len(x),
        samples=len(x),
        macs=sum(part.macs for _, part in parts),
        seconds=max(part.seconds for _, part in parts),
        layers=[
            layer | {key: sum(part.layers[number][key] for _, part in parts) for key in _COUNTS}
            for number, layer in enumerate(first.layers)
        ],
        inputs=_in_order(parts, "inputs"),
        outputs=_in_order(parts, "outputs"),
        words=_in_order(parts, "words"),
    )


def _in_order(parts: list[tuple[npt.NDArray[np.int64], Emulation]], name: str) -> npt.NDArray[Any]:
    order = np.argsort(np.concatenate([share for share, _ in parts]), kind="stable")
    return np.concatenate([getattr(part, name) for _, part in parts])[order]
