"""Running a whole net over a data set: accuracy, outputs, and what each layer did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.executor import Executor
from lnsdeploy.emulator.graph import LayerRecord
from lnsdeploy.errors import BadValueError
from lnsdeploy.files import atomic_path
from lnsdeploy.formats import Words


@dataclass(frozen=True, eq=False)
class Emulation:
    """The result of a run.

    Args:
        accuracy: fraction of the samples whose largest output is the label's; None without labels.
        samples: their number.
        executor: who ran it.
        datapath_name, fingerprint: the datapath of most layers.
        macs: multiply-accumulate operations in all.
        seconds: wall-clock time of the executor.
        layers: per node name, op, macs, words, saturated, flushed; counts only where the executor reports them.
        inputs: float32 [samples, …], as fed to the model.
        outputs: float32 [samples, …], the decoded outputs.
        words: the output words.
    """

    accuracy: float | None
    samples: int
    executor: str
    datapath_name: str
    fingerprint: str
    macs: int
    seconds: float
    layers: list[dict[str, Any]]
    inputs: npt.NDArray[np.float32]
    outputs: npt.NDArray[np.float32]
    words: Words

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the arrays."""
        return {
            "accuracy": self.accuracy,
            "samples": self.samples,
            "executor": self.executor,
            "datapath": {"name": self.datapath_name, "fingerprint": self.fingerprint},
            "macs": self.macs,
            "seconds": round(self.seconds, 4),
            "words": sum(layer["words"] for layer in self.layers),
            "saturated": sum(layer["saturated"] for layer in self.layers),
            "flushed": sum(layer["flushed"] for layer in self.layers),
            "layers": self.layers,
        }

    def save_outputs(self, path: str | Path) -> None:
        """Write `inputs`, `outputs` (float32) and `words` to an .npz file, atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, inputs=self.inputs, outputs=self.outputs, words=self.words)


def emulate(
    artifact: Artifact,
    executor: Executor,
    x: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None,
    *,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Emulation:
    """Run a net over inputs.

    Args:
        x: float inputs [n, …].
        labels: integers [n], or None where nobody knows them.
        batch: inputs at a time; results do not depend on it.
        progress: called with the number of inputs done.

    Raises:
        BadValueError: no inputs, or as many labels as inputs are not there.
    """
    if len(x) == 0 or (labels is not None and len(x) != len(labels)):
        count = "no" if labels is None else len(labels)
        raise BadValueError(f"emulation needs inputs, and labels for each if any, not {len(x)} and {count} labels")
    x = np.ascontiguousarray(x, dtype=np.float32)
    records: dict[str, LayerRecord] = {}
    parts = []
    # the first call builds sessions and tables; time the runs only
    executor.run(artifact, x[:1])
    start = time.perf_counter()
    for first in range(0, len(x), batch):
        parts.append(executor.run(artifact, x[first : first + batch], records=records))
        if progress:
            progress(min(first + batch, len(x)))
    seconds = time.perf_counter() - start
    words = np.concatenate(parts)
    outputs = artifact.graph.decode_output(words)
    right = None
    if labels is not None:
        right = int((outputs.reshape(len(x), -1).argmax(axis=1) == np.asarray(labels)).sum())
    datapath = artifact.graph.datapath
    layers = [
        {
            "name": record.name,
            "op": record.op,
            "macs": artifact.macs.get(record.name, 0) * len(x),
            "words": record.counts.words,
            "saturated": record.counts.saturated,
            "flushed": record.counts.flushed,
        }
        for record in records.values()
    ]
    return Emulation(
        accuracy=None if right is None else right / len(x),
        samples=len(x),
        executor=executor.name,
        datapath_name=datapath.name,
        fingerprint=datapath.fingerprint,
        macs=sum(artifact.macs.values()) * len(x),
        seconds=seconds,
        layers=layers,
        inputs=x,
        outputs=outputs,
        words=words,
    )
