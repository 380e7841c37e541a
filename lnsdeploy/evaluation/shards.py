"""Many processes, one result: who does which batches, and how they tell each other what they counted.

torchrun starts the processes and says in the environment who is who. What crosses between them are counters and
messages, small and in host memory, so that gloo serves whatever device computes; NCCL may be asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lnsdeploy.errors import BadValueError, LNSError, MissingDependencyError, OtherProcessError, SilentExit

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

BACKENDS = ("gloo", "nccl")

# The first process may download weights while the others wait.
_PATIENCE = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class Shards:
    """The processes of a run, and which of them this one is.

    Args:
        rank, world: its number, and how many there are.
        local_rank, local_world: the same on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks."""
        return self.rank == 0

    def own(self, batches: int) -> range:
        """The numbers of the batches that are this process's: every `world`-th."""
        return range(self.rank, batches, self.world)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in every process; where it fails in one, all end.

        Raises:
            LNSError: `work` failed. The first process has the message; others end silently.
            SilentExit: another process failed, and the first will say it.
        """
        if self.world == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        told = self._exchange(None if error is None else _described(error))
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if not failed:
            return result
        if error is not None and (self.is_first or not _expected(error)):
            raise error
        if self.is_first:
            rank, text = failed[0]
            raise OtherProcessError(f"process {rank} of {self.world}: {text}")
        self._await_first()
        raise SilentExit from error

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; in the first process, an empty list elsewhere."""
        if self.world == 1:
            return [value]
        from torch import distributed

        found: list[Any] | None = [None] * self.world if self.is_first else None
        with self._alive():
            distributed.gather_object(value, found)
        return found or []

    def broadcast(self, value: T) -> T:
        """The first process's value, in all."""
        if self.world == 1:
            return value
        from torch import distributed

        found = [value]
        with self._alive():
            distributed.broadcast_object_list(found, src=0)
        return found[0]

    def _await_first(self) -> None:
        """Wait until the first process has ended, having said why: torchrun kills all as soon as one ends."""
        from torch import distributed

        with contextlib.suppress(RuntimeError):
            distributed.barrier()

    def _exchange(self, value: Any) -> list[Any]:
        from torch import distributed

        found: list[Any] = [None] * self.world
        with self._alive():
            distributed.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # a process that was killed closes its connections
            if self.is_first:
                text = " ".join(str(error).split())
                raise OtherProcessError(f"another process ended before its time ({text[:160]})") from error
            raise SilentExit from error


def _expected(error: Exception) -> bool:
    return isinstance(error, (LNSError, OSError, MemoryError))


def _described(error: Exception) -> str:
    if isinstance(error, LNSError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_sharded() -> bool:
    """Whether torchrun started more than one process."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


@contextlib.contextmanager
def processes(backend: str = "gloo") -> Iterator[Shards]:
    """The processes that torchrun started, connected; this one alone where it started none.

    Inside, the products of each process take its share of the machine's cores, unless LNSDEPLOY_THREADS says otherwise.

    Args:
        backend: ``gloo``, or ``nccl`` where each process has a GPU of its own.

    Raises:
        BadValueError: the environment is not torchrun's.
        MissingDependencyError: torch was built without it.
    """
    if not is_sharded():
        yield Shards()
        return
    import torch
    from torch import distributed

    if not distributed.is_available():
        raise MissingDependencyError(f"torch {torch.__version__} was built without torch.distributed")
    shards = Shards(*(_integer(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if backend == "nccl":
        if not torch.cuda.is_available() or torch.cuda.device_count() < shards.local_world:
            raise BadValueError(f"nccl needs a GPU for each process, {shards.local_world} here; gloo needs none")
        torch.cuda.set_device(shards.local_rank)
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise OtherProcessError(
            f"process {shards.rank} cannot join the others: {' '.join(str(error).split())}"
        ) from error
    with share_cores(shards):
        # after an error the connections stay until the process ends, which the others wait for
        yield shards
    # nobody takes the connections down while another still uses them
    distributed.barrier()
    distributed.destroy_process_group()


@contextlib.contextmanager
def share_cores(shards: Shards) -> Iterator[None]:
    """The native library takes this process's share of the cores inside, unless its variable is set."""
    from lnsdeploy.emulator.native import THREADS_VARIABLE

    if shards.local_world == 1 or THREADS_VARIABLE in os.environ:
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ[THREADS_VARIABLE] = str(max(1, cores // shards.local_world))
    try:
        yield
    finally:
        del os.environ[THREADS_VARIABLE]


def _integer(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise BadValueError(f"{name} must be a number, not {text!r}: start processes with torchrun")
    return int(text)


def device_of(name: str, shards: Shards) -> torch.device:
    """The device of this process: with several GPUs, each process of a machine has its own.

    Raises:
        BadValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadValueError(f"device must be cpu, cuda, cuda:N or auto, not {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadValueError(f"{name}: this torch finds no GPU here; use --device cpu")
        count = torch.cuda.device_count()
        index = shards.local_rank % count if device.index is None else device.index
        if index >= count:
            raise BadValueError(f"{name}: there are {count} GPUs, counted from 0")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device
