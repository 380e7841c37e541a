"""What a float net is calibrated on, and what its tensors look like there (docs/export.md).

Inputs come a batch at a time, and of each tensor only a histogram of its magnitudes is kept, so that memory does not
grow with their number. Bins are thirty-seconds of an octave: they are the exponent and the first five fraction bits of
the float32 number itself, so no logarithm is taken and every platform counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, MissingDependencyError, UnknownNameError
from lnsdeploy.files import read_bytes
from lnsdeploy.formats import METHODS, LNSFormat, Method, offset_for, random_bytes

Floats = npt.NDArray[np.float32]

# Fraction bits of a float32 that a bin leaves out, and the bins that are left.
_DROPPED = 18
_BINS = 1 << (31 - _DROPPED)
# Synthetic inputs, where nothing says how many.
SYNTHETIC = 64
_INPUT_KEYS = ("x", "inputs", "input", "images", "data", "calibration")
_LABEL_KEYS = ("y", "labels", "label", "targets")


# ---------------------------------------------------------------------------------------------------
# Statistics


@dataclass(eq=False)
class Statistics:
    """The magnitudes of a tensor over all inputs.

    Args:
        counts: int64 [8192], numbers by exponent and first five fraction bits; zeros are in bin 0.
        maximum: the largest, exactly.
        total: how many numbers there were, zeros included.
    """

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    maximum: float = 0.0
    total: int = 0

    def add(self, values: npt.NDArray[Any], name: str = "tensor") -> None:
        """Count some numbers.

        Raises:
            BadValueError: NaN or infinity among them.
        """
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if not flat.size:
            return
        bits = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
        largest = int(bits.max())
        if largest >= 0x7F800000:
            raise BadValueError(f"the float net gives NaN or infinity in {name!r} for the calibration inputs")
        self.counts += np.bincount(bits >> np.uint32(_DROPPED), minlength=_BINS)
        self.maximum = max(self.maximum, float(np.uint32(largest).view(np.float32)))
        self.total += flat.size

    def joined(self, other: Statistics) -> Statistics:
        """The magnitudes of both."""
        return Statistics(self.counts + other.counts, max(self.maximum, other.maximum), self.total + other.total)

    def offset(self, fmt: LNSFormat, method: Method = "absmax", percentile: float = 99.9) -> int:
        """The offset for these magnitudes, as :func:`lnsdeploy.formats.calibrate` chooses it (spec 2.6).

        ``"absmax"`` is exact. ``"percentile"`` and ``"lsq"`` know magnitudes to a thirty-second of an octave.

        Raises:
            UnknownNameError, BadValueError: an argument is wrong.
        """
        if method not in METHODS:
            raise UnknownNameError("calibration method", method, METHODS)
        if not 0 < percentile <= 100:
            raise BadValueError(f"percentile must be above 0 and at most 100, not {percentile}")
        if self.maximum == 0:
            return 0
        if method == "absmax":
            return offset_for(self.maximum, fmt)
        if method == "percentile":
            rank = max(int(-(-self.total * percentile // 100)), 1)
            bin_ = int(np.searchsorted(np.cumsum(self.counts), rank))
            edge = min(float(_edges()[min(bin_ + 1, _BINS - 1)]), self.maximum)
            return offset_for(edge, fmt)
        return self._least_squares(fmt)

    def _least_squares(self, fmt: LNSFormat) -> int:
        used = np.flatnonzero(self.counts[1:]) + 1
        if not used.size:
            return offset_for(self.maximum, fmt)
        count = self.counts[used].astype(np.float64)
        value = np.minimum(_middles()[used], self.maximum)
        # codes lie on one absolute grid, whatever the offset
        code = np.rint(np.log2(value) * fmt.gamma)
        inside = count * np.square(value - np.exp2(code / fmt.gamma))
        energy = count * np.square(value)
        highest = offset_for(self.maximum, fmt) + fmt.max_code
        best, least = highest, np.inf
        for top in range(highest, highest - fmt.max_code, -1):
            over = code > top
            under = code <= top - fmt.max_code
            clipped = float((count[over] * np.square(value[over] - np.exp2(top / fmt.gamma))).sum())
            error = clipped + float(energy[under].sum()) + float(inside[~over & ~under].sum())
            if error < least:
                best, least = top, error
            if clipped > least:
                break
        return best - fmt.max_code


def _edges() -> npt.NDArray[np.float64]:
    """The smallest number of each bin."""
    with np.errstate(invalid="ignore"):  # the last bins are those of NaN
        floats = (np.arange(_BINS, dtype=np.uint32) << np.uint32(_DROPPED)).view(np.float32)
        return np.asarray(floats.astype(np.float64))


def _middles() -> npt.NDArray[np.float64]:
    edges = _edges()
    with np.errstate(invalid="ignore", over="ignore"):
        upper = np.append(edges[1:], np.inf)
        return np.where(np.isfinite(upper), (edges + upper) / 2, edges)


# ---------------------------------------------------------------------------------------------------
# Inputs


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a net, and labels where they are known.

    Args:
        name: as on the command line.
        source: where they come from, for people.
        x: float32 [n, …].
        labels: int64 [n], or None.
        synthetic: whether they were made up.
        data: the data set that they are of, if they are of one.
    """

    name: str
    source: str
    x: Floats
    labels: npt.NDArray[np.int64] | None = None
    synthetic: bool = False
    data: str = ""

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator[Floats]:
        """The inputs, `size` at a time."""
        for first in range(0, len(self.x), size):
            yield self.x[first : first + size]

    def part(self, first: int, last: int | None) -> Inputs:
        """Some of them."""
        labels = None if self.labels is None else self.labels[first:last]
        return replace(self, x=self.x[first:last], labels=labels)


@dataclass(frozen=True)
class Preparation:
    """How pictures become inputs: (pixel/255 − mean) / std.

    Args:
        mean, std: one number, or one a channel.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def parse(cls, mean: str | None, std: str | None) -> Preparation:
        """From text such as ``0.485,0.456,0.406``.

        Raises:
            BadValueError: no numbers.
        """

        def numbers(text: str | None, name: str) -> tuple[float, ...]:
            try:
                return tuple(float(part) for part in text.split(",")) if text else ()
            except ValueError as error:
                raise BadValueError(f"--{name} is one number, or one a channel, not {text!r}") from error

        return cls(numbers(mean, "mean"), numbers(std, "std"))


def load_inputs(
    what: str | Path | npt.NDArray[Any] | Iterable[Any] | None,
    shape: tuple[int, ...],
    *,
    split: str = "train",
    data_dir: Path | None = None,
    preparation: Preparation | None = None,
    seed: int = 0,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> Inputs:
    """Inputs for a net.

    Args:
        what: an .npz or .npy file (of inputs, or of a whole data set: ``train_x``, ``train_y``, …), a folder of
            pictures, the name of a data set, an array [n, …], any iterable of arrays (single inputs or batches, with
            labels as ``(x, y)`` or without), or None for made-up ones.
        shape: of the net's input, 0 for the batch axis.
        split: of a data set: ``"train"`` or ``"test"``.
        data_dir: where data sets lie that are files.
        preparation: of pictures in a folder.
        seed: of made-up inputs.
        limit: the first so many only.
        names: of the net's input, under which an .npz file may hold them.

    Raises:
        BadFileError: a file is missing or damaged. BadValueError: the inputs do not fit the net, or hold NaN.
        UnknownNameError: no such file and no such data set. BadTypeError: none of these.
    """
    if what is None:
        return synthetic(shape, seed=seed, limit=limit)
    if isinstance(what, (str, Path)):
        from lnsdeploy.training.arrays import is_split

        path = Path(what)
        if path.is_dir():
            return _folder(path, shape, preparation or Preparation(), limit)
        if path.suffix == ".npz" and is_split(path):
            return _data_set(str(what), shape, split, data_dir, limit)
        if path.suffix in (".npz", ".npy") or path.is_file():
            return _file(path, shape, names, limit)
        if isinstance(what, str):
            return _data_set(what, shape, split, data_dir, limit)
        raise BadFileError(f"cannot read {path}: no such file or folder")
    if isinstance(what, np.ndarray):
        return Inputs("array", f"{len(what)} inputs from memory", _fitting(what, shape, "the inputs", limit))
    return _iterable(what, shape, limit)


def _fitting(x: npt.NDArray[Any], shape: tuple[int, ...], told: str, limit: int | None) -> Floats:
    """Inputs as float32 [n, …] of the net's shape."""
    if x.dtype.kind not in "fiub":
        raise BadValueError(f"{told} hold {x.dtype}; numbers are needed")
    if x.shape == shape[1:]:
        x = x[None]
    if x.ndim != len(shape) or x.shape[1:] != shape[1:]:
        wanted = ", ".join(["n", *map(str, shape[1:])])
        raise BadValueError(f"{told} have the shape {list(x.shape)}; the net takes [{wanted}]")
    x = x[:limit]
    if not len(x):
        raise BadValueError(f"{told} are empty")
    made = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(made).all():
        raise BadValueError(f"{told} hold NaN or infinity")
    return made


def _file(path: Path, shape: tuple[int, ...], names: Sequence[str], limit: int | None) -> Inputs:
    import io
    import zipfile
    import zlib

    data = read_bytes(path, limit=1 << 34)
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = {key: found[key] for key in found.files} if hasattr(found, "files") else {"x": found}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise BadFileError(f"{path}: not a readable .npy or .npz file of numbers ({_line(error)})") from error
    known = (*names, *_INPUT_KEYS)
    key = next((k for k in known if k in arrays), None)
    rest = [k for k in arrays if k not in _LABEL_KEYS]
    if key is None and len(rest) == 1:
        key = rest[0]
    if key is None:
        raise BadFileError(f"{path}: holds {', '.join(arrays) or 'nothing'}; the inputs are to be named x")
    x = _fitting(arrays[key], shape, f"{path}: the inputs {key!r}", limit)
    label = next((k for k in _LABEL_KEYS if k in arrays), None)
    labels = None
    if label is not None:
        labels = _labels(arrays[label][:limit], len(x), str(path))
    return Inputs(path.name, f"{len(x)} inputs of {path.name}", x, labels)


def _labels(values: npt.NDArray[Any], count: int, where: str) -> npt.NDArray[np.int64]:
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise BadFileError(
            f"{where}: labels are {count} integers, not {values.dtype} of the shape {list(values.shape)}"
        )
    return values.astype(np.int64)


def _folder(path: Path, shape: tuple[int, ...], preparation: Preparation, limit: int | None) -> Inputs:
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise BadValueError(f"{path}: pictures are of no use to a net that takes {list(shape[1:])}; give an .npz file")
    samples = _samples()
    from lnsdeploy.evaluation.inputs import ImageInput

    channels = shape[1]
    mean, std = (values * channels if len(values) == 1 else values for values in (preparation.mean, preparation.std))
    wanted = ImageInput((channels, shape[2], shape[3]), mean, std)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in samples._IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not files:
        raise BadFileError(f"{path}: no pictures ({', '.join(samples._IMAGE_SUFFIXES)}) in it")
    prepare = samples._Normal(wanted)
    x = np.stack([prepare(samples.read_image(file, wanted)).numpy() for file in files[: limit or 512]])
    return Inputs(path.name, f"{len(x)} of {len(files)} pictures in {path.name}", x)


def _samples() -> Any:
    try:
        from lnsdeploy.evaluation import samples
    except ImportError as error:
        raise MissingDependencyError(
            f"pictures and made-up pictures need torch ({error}): pip install 'lnsdeploy[train,models]', or give "
            "inputs in an .npz file"
        ) from error
    return samples


def _data_set(name: str, shape: tuple[int, ...], split: str, data_dir: Path | None, limit: int | None) -> Inputs:
    from lnsdeploy.training.arrays import names_arrays
    from lnsdeploy.training.data import data_names, load_data

    if name == "synthetic":
        return synthetic(shape, limit=limit)
    if name not in data_names() and not names_arrays(name):
        raise UnknownNameError("file, folder or data set", name, data_names())
    found = load_data(name, data_dir)
    x, y = (found.train_x, found.train_y) if split == "train" else (found.test_x, found.test_y)
    if x.shape[1:] != shape[1:] and int(np.prod(x.shape[1:])) == int(np.prod(shape[1:])):
        x = x.reshape(len(x), *shape[1:])
    made = _fitting(x, shape, f"the images of {name}", limit)
    kind = "training" if split == "train" else "test"
    return Inputs(name, f"{len(made)} {kind} images of {name}", made, y[:limit], data=name)


def _iterable(what: Any, shape: tuple[int, ...], limit: int | None) -> Inputs:
    try:
        items = iter(what)
    except TypeError as error:
        raise BadTypeError(
            "inputs are an array, an iterable of arrays, a file, a folder or the name of a data set, not "
            f"{type(what).__name__}"
        ) from error
    parts: list[Floats] = []
    labels: list[npt.NDArray[np.int64]] | None = []
    count = 0
    for item in items:
        x, y = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        made = _fitting(_numpy(x), shape, "the inputs", None)
        parts.append(made)
        found = None if y is None else np.atleast_1d(_numpy(y))
        if labels is not None and found is not None and found.dtype.kind in "iu" and found.shape == (len(made),):
            labels.append(found.astype(np.int64))
        else:
            labels = None
        count += len(made)
        if limit is not None and count >= limit:
            break
    if not parts:
        raise BadValueError("the inputs are empty")
    x = np.concatenate(parts)[:limit]
    return Inputs("iterable", f"{len(x)} inputs from memory", x, np.concatenate(labels)[:limit] if labels else None)


def _numpy(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def synthetic(shape: tuple[int, ...], *, seed: int = 0, limit: int | None = None) -> Inputs:
    """Made-up inputs, the same on every machine: coloured noise for pictures, normal numbers for all else."""
    count = limit or SYNTHETIC
    if len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) >= 4:
        try:
            samples = _samples()
        except MissingDependencyError:
            pass
        else:
            from lnsdeploy.evaluation.inputs import ImageInput

            # normalised as pictures of ImageNet commonly are
            mean, std = ((0.5,) * shape[1], (0.25,) * shape[1])
            made = samples.synthetic(ImageInput((shape[1], shape[2], shape[3]), mean, std), seed=seed, limit=count)
            x = made.batch(0, count).inputs.numpy()
            return Inputs("synthetic", f"synthetic: {count} pictures of coloured noise, seed {seed}", x, None, True)
    size = int(np.prod(shape[1:]))
    parts = []
    for number in range(count):
        words = random_bytes(seed, number, 48 * size).view("<u4").reshape(12, size)
        parts.append((words.astype(np.float64).sum(axis=0) / 2**32 - 6).astype(np.float32))
    x = np.stack(parts).reshape(count, *shape[1:])
    return Inputs("synthetic", f"synthetic: {count} inputs of normal numbers, seed {seed}", x, None, True)


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


# ---------------------------------------------------------------------------------------------------
# Running the float net


class FloatNet:
    """A float ONNX model in ONNX Runtime, with every float tensor of it at hand.

    Args:
        model: onnx.ModelProto in the form of :mod:`lnsdeploy.exporters.source`.

    Raises:
        BadFileError: ONNX Runtime refuses it.
    """

    def __init__(self, model: Any):
        from onnx import TensorProto

        from lnsdeploy.emulator.ort import float_session

        self.model = model
        self.input = str(model.graph.input[0].name)
        self.output = str(model.graph.output[0].name)
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
        self.names = [
            name
            for node in model.graph.node
            for name in node.output
            if name and types.get(name, TensorProto.FLOAT) == TensorProto.FLOAT and node.op_type != "Constant"
        ]
        tapped = type(model)()
        tapped.CopyFrom(model)
        from onnx import helper

        present = {value.name for value in tapped.graph.output}
        for name in self.names:
            if name not in present:
                tapped.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        self._session = float_session(tapped.SerializeToString())
        self._plain = float_session(model.SerializeToString())

    def run(self, x: npt.NDArray[Any]) -> Floats:
        """The output for a batch."""
        found: Floats = self._run(self._plain, [self.output], x)[self.output]
        return found

    def values(self, x: npt.NDArray[Any], names: Sequence[str] | None = None) -> dict[str, Floats]:
        """Every float tensor for a batch, by name; the input among them."""
        wanted = list(self.names if names is None else [n for n in names if n != self.input])
        found = self._run(self._session, wanted, x) if wanted else {}
        found[self.input] = np.asarray(x, dtype=np.float32)
        return found

    def _run(self, session: Any, names: list[str], x: npt.NDArray[Any]) -> dict[str, Any]:
        try:
            return dict(zip(names, session.run(names, {self.input: x}), strict=True))
        except Exception as error:  # ONNX Runtime has no common base class of its errors
            raise BadFileError(f"ONNX Runtime cannot run the float net: {_line(error)}") from error

    def floats_per_input(self, x: npt.NDArray[Any]) -> int:
        """Numbers that all tensors together hold for one input."""
        return sum(value.size for value in self.values(x[:1]).values())


def collect(
    net: FloatNet, inputs: Inputs, *, batch: int, progress: Callable[[int], None] | None = None
) -> dict[str, Statistics]:
    """The magnitudes of every float tensor over all inputs, by name.

    Args:
        batch: inputs at a time: what memory is needed for.
        progress: called with the number of inputs done.

    Raises:
        BadValueError: the net gives NaN or infinity.
    """
    found: dict[str, Statistics] = {}
    done = 0
    for part in inputs.batches(batch):
        for name, value in net.values(part).items():
            found.setdefault(name, Statistics()).add(value, name)
        done += len(part)
        if progress:
            progress(done)
    return found
