"""Who runs which point when: a queue in Optuna's storage that any number of processes and machines work off.

A study's points are trials of an Optuna study. They are put into the queue a generation at a time, and which they are
follows from the study and from the results of earlier generations alone, so that one worker and many run the same ones.
A trial is claimed by a compare-and-set in the database; the claim names host, process and the process's start, so that
a process that was killed is known to be dead at once on its own machine, and by its silence on others. What it held is
put into the queue again. Of several trials with one fingerprint only the first is run.

Few trials wait at a time: every look at the queue reads all that are not finished, and a queue of a thousand would be
read a thousand times.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lnsdeploy.errors import BadFileError, BadValueError, LNSError, MissingDependencyError
from lnsdeploy.studies.points import Outcome, describe_error, evaluate, quiet
from lnsdeploy.studies.space import Point, Study, parse_study

# A worker on another machine that has been silent for so long is taken for dead; it says something far more often.
SILENCE = 180.0
BEAT = 15.0
# A claimed trial that names nobody was taken by a process that was killed in that instant.
NAMELESS = 10.0
# A point whose process died so often is given up.
ATTEMPTS = 5
# Trials that wait: these, and so many more for each worker.
AHEAD, AHEAD_EACH = 8, 2
_PAUSE = 0.2
_DEAD = "its process ended"
Progress = Callable[[int, int, str], None]


def optuna() -> Any:
    """The package, quiet.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import optuna as found
    except ImportError as error:
        raise MissingDependencyError("a study needs Optuna: pip install 'lnsdeploy[study]'") from error
    import warnings

    found.logging.set_verbosity(found.logging.ERROR)
    warnings.filterwarnings("ignore", category=found.exceptions.ExperimentalWarning)
    return found


def default_storage(out: Path) -> str:
    """The URL of the SQLite file in a folder."""
    return f"sqlite:///{(out / 'study.db').absolute()}"


@dataclass(frozen=True)
class Job:
    """What a worker must know; plain text and numbers, for any process on any machine.

    Args:
        toml: of the study.
        folder: that paths in it are relative to.
        out: of nets and runs.
        storage: the database's URL.
        data_dir: where data sets lie, instead of where the study says.
    """

    toml: str
    folder: str
    out: str
    storage: str
    data_dir: str | None = None

    def study(self) -> Study:
        """The study."""
        return parse_study(self.toml, folder=Path(self.folder), data_dir=self.data_dir)


class Queue:
    """A study's trials in its storage.

    Args:
        study: whose.
        storage: a database URL.

    Raises:
        MissingDependencyError: no Optuna, or no driver of that database.
        BadFileError: the database cannot be opened.
    """

    def __init__(self, study: Study, storage: str):
        self.study = study
        package = self.optuna = optuna()
        engine = {"connect_args": {"timeout": 120}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
        try:
            self.storage = package.storages.RDBStorage(storage, engine_kwargs=engine)
            self.trials_of = package.create_study(
                storage=self.storage,
                study_name=f"{study.name} {study.fingerprint}",
                directions=list(study.objectives.values()),
                load_if_exists=True,
            )
        except ImportError as error:
            raise MissingDependencyError(f"storage {_hidden(storage)}: {error}") from error
        except Exception as error:  # drivers have no common base class
            raise BadFileError(f"cannot open the storage {_hidden(storage)}: {_line(error)}") from error
        self.states = package.trial.TrialState
        self.owner = _owner()

    def trials(self) -> list[Any]:
        """All trials, in the order of their numbers."""
        return list(self.trials_of.get_trials(deepcopy=False))

    def table(self) -> dict[str, list[Any]]:
        """Trials that count, by fingerprint: those of killed processes and doubles do not."""
        found: dict[str, list[Any]] = {}
        for trial in self.trials():
            if "fingerprint" in trial.user_attrs and not self.is_void(trial):
                found.setdefault(trial.user_attrs["fingerprint"], []).append(trial)
        return found

    def is_void(self, trial: Any) -> bool:
        """Whether a trial is only a trace: its process was killed, or it was queued twice."""
        return bool(
            trial.state == self.states.FAIL and ("void" in trial.user_attrs or "outcome" not in trial.user_attrs)
        )

    def put(
        self,
        points: Sequence[tuple[int, Point]],
        ahead: int | None = None,
        present: Mapping[str, Sequence[Any]] | None = None,
    ) -> int:
        """Queue what has no trial yet; points come with their place in the study. How many were queued.

        Args:
            ahead: how many may wait, those that do already included; None for all.
            present: what :meth:`table` has just given.
        """
        present = self.table() if present is None else present
        waiting = sum(trial.state == self.states.WAITING for trials in present.values() for trial in trials)
        missing = [(place, point) for place, point in points if point.fingerprint not in present]
        deaths = self.deaths() if missing else {}
        count = 0
        for place, point in missing:
            outcome = self.known_elsewhere(point)
            if deaths.get(point.fingerprint, 0) >= ATTEMPTS:
                outcome = Outcome("failed", f"its process died {ATTEMPTS} times", {}, {}, {}, [])
            if outcome is None and ahead is not None and waiting >= ahead:
                continue
            attributes = {"fingerprint": point.fingerprint, "place": place, "point": json.dumps(point.to_dict())}
            state, values = self.states.WAITING, None
            if outcome is not None:
                attributes["outcome"] = json.dumps(outcome.to_dict())
                state, values = self._final(outcome)
            self.trials_of.add_trial(self.optuna.trial.create_trial(state=state, values=values, user_attrs=attributes))
            waiting += outcome is None
            count += 1
        return count

    def claim(self) -> Any | None:
        """A trial that this process is to run, or None if none waits."""
        present = self.table()
        waiting = [trial for trials in present.values() for trial in trials if trial.state == self.states.WAITING]
        for trial in sorted(waiting, key=lambda t: (t.user_attrs["place"], t.number)):
            try:
                if not self.storage.set_trial_state_values(trial._trial_id, self.states.RUNNING):
                    continue
                self.say(trial, "claim", self.owner | {"beat": time.time()})
            except self.optuna.exceptions.UpdateFinishedTrialError:
                continue
            # a twin of a lower number was there when this one was made
            if any(other.number < trial.number for other in present[trial.user_attrs["fingerprint"]]):
                self.void(trial, "queued twice")
                continue
            return trial
        return None

    def say(self, trial: Any, name: str, value: Any) -> None:
        """Set an attribute of a trial."""
        self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def void(self, trial: Any, why: str) -> None:
        """Make a trial a mere trace."""
        with suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            self.say(trial, "void", why)
            self.storage.set_trial_state_values(trial._trial_id, self.states.FAIL)

    def finish(self, trial: Any, outcome: Outcome) -> None:
        """Keep what became of a trial; nothing if another process has taken this one for dead."""
        with suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            self.say(trial, "outcome", json.dumps(outcome.to_dict()))
            state, values = self._final(outcome)
            self.storage.set_trial_state_values(trial._trial_id, state, values)

    def _final(self, outcome: Outcome) -> tuple[Any, list[float] | None]:
        """The trial's state and values of an outcome."""
        if outcome.state == "failed":
            return self.states.FAIL, None
        if outcome.state != "complete":
            return self.states.PRUNED, None
        # a baseline's cost may not be known: then it is no better than any
        worst = {"maximize": float("-inf"), "minimize": float("inf")}
        found = [outcome.values.get(name) for name in self.study.objectives]
        directions = self.study.objectives.values()
        return self.states.COMPLETE, [
            worst[direction] if value is None else float(value)
            for value, direction in zip(found, directions, strict=True)
        ]

    def known_elsewhere(self, point: Point) -> Outcome | None:
        """What another study has found out about a point, if it asked for all that this one needs."""
        found = self.elsewhere.get(point.fingerprint)
        if found is None or (found.state == "complete" and any(found.values.get(n) is None for n in self.study.needed)):
            return None
        return found

    @cached_property
    def elsewhere(self) -> dict[str, Outcome]:
        """What other studies in the storage have found out, by fingerprint; failures are tried again."""
        found: dict[str, Outcome] = {}
        for name in self.optuna.get_all_study_names(self.storage):
            if name == self.trials_of.study_name:
                continue
            states = (self.states.COMPLETE, self.states.PRUNED)
            for trial in self.optuna.load_study(study_name=name, storage=self.storage).get_trials(False, states):
                if "outcome" in trial.user_attrs:
                    found[trial.user_attrs["fingerprint"]] = Outcome(**json.loads(trial.user_attrs["outcome"]))
        return found

    def recover(self) -> int:
        """Trials of dead processes become traces; how many."""
        count = 0
        for trial in self.trials_of.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            if self.is_dead(trial):
                self.void(trial, _DEAD)
                count += 1
        return count

    def is_dead(self, trial: Any) -> bool:
        """Whether nobody works on a running trial any more."""
        claim = trial.user_attrs.get("claim")
        if claim is None:
            begun = trial.datetime_start
            return begun is not None and time.time() - begun.timestamp() > NAMELESS
        if claim["host"] == self.owner["host"] and claim["started"] is not None:
            return bool(_started(claim["pid"]) != claim["started"])
        return bool(time.time() - claim["beat"] > SILENCE)

    def deaths(self) -> dict[str, int]:
        """How often a process died over each point."""
        found: dict[str, int] = {}
        for trial in self.trials():
            if trial.state == self.states.FAIL and trial.user_attrs.get("void") == _DEAD:
                fingerprint = trial.user_attrs["fingerprint"]
                found[fingerprint] = found.get(fingerprint, 0) + 1
        return found

    def outcomes(self) -> list[tuple[int, Point, Outcome, Any]]:
        """What is finished, in the order of the study: place, point, outcome, trial."""
        found = []
        for trials in self.table().values():
            for trial in trials:
                if trial.state.is_finished() and "outcome" in trial.user_attrs:
                    outcome = Outcome(**json.loads(trial.user_attrs["outcome"]))
                    point = self.study.from_dict(json.loads(trial.user_attrs["point"]))
                    found.append((int(trial.user_attrs["place"]), point, outcome, trial))
                    break
        return sorted(found, key=lambda entry: entry[0])

    @contextmanager
    def beating(self, trial: Any) -> Iterator[None]:
        """While a trial runs, say now and then that it does, for workers on other machines."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                # a beat that fails is made up for by the next
                with suppress(Exception):
                    self.say(trial, "claim", self.owner | {"beat": time.time()})

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _owner() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def _host() -> str:
    """A machine, or what looks like one: containers count process ids anew."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"
    return f"{socket.gethostname()} {boot} {space}"


def _started(pid: int) -> str | None:
    """When a process began, in the system's ticks; None if there is none, or the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    # a zombie works on nothing any more
    return None if fields[0] == "Z" else fields[19]


def _hidden(url: str) -> str:
    """A database URL without its password."""
    head, at, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://…@{tail}" if at else url


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ---------------------------------------------------------------------------------------------------
# Generations


def generation(study: Study, number: int, earlier: Sequence[tuple[int, Point, Outcome]]) -> list[Point]:
    """The points of a generation; the same wherever and by whomever it is asked for.

    Args:
        number: 0, 1, …; a grid and random points are one generation, with the baselines.
        earlier: what became of all earlier points, in the study's order.
    Returns: no points when the study has all.
    """
    search = study.search
    if search.method in ("grid", "random"):
        if number:
            return []
        points = study.grid() if search.method == "grid" else study.drawn()
        return [*study.baselines(), *islice(points, search.trials or None)]
    done = sum(point.kind == "lns" for _, point, _ in earlier)
    wanted = min(search.generation, search.trials - done)
    if wanted <= 0:
        return []
    first = study.baselines() if number == 0 else []
    return first + _proposed(study, number, earlier, wanted)


def _proposed(study: Study, number: int, earlier: Sequence[tuple[int, Point, Outcome]], wanted: int) -> list[Point]:
    """New points by Optuna's sampler, which is shown the earlier ones in their order and has a seed of its own."""
    package = optuna()
    seed = random.Random(f"{study.search.seed} {number}").randrange(1 << 31)
    if study.search.method == "tpe":
        sampler = package.samplers.TPESampler(seed=seed, n_startup_trials=study.search.generation)
    else:
        sampler = package.samplers.NSGAIISampler(seed=seed, population_size=study.search.generation)
    asked = package.create_study(directions=list(study.objectives.values()), sampler=sampler)
    kinds = {name: package.distributions.CategoricalDistribution(values) for name, values in study.dimensions.items()}
    seen = set()
    for _, point, outcome in earlier:
        seen.add(point.fingerprint)
        found = [outcome.values.get(name) for name in study.objectives]
        if point.kind != "lns" or outcome.state != "complete" or any(value is None for value in found):
            continue
        chosen = {"net": point.net, **point.parameters}
        # choices that were dropped are filled in by the first, so that the sampler knows all of them
        chosen = {name: chosen.get(name, values[0]) for name, values in study.dimensions.items()}
        made = package.trial.create_trial(params=chosen, distributions=kinds, values=found)
        if study.search.method == "nsga2":
            made.system_attrs["NSGAIISampler:generation"] = max(number - 1, 0)
        asked.add_trial(made)
    points: list[Point] = []
    for _ in range(50 * wanted):
        trial = asked.ask(kinds)
        point = study.point(trial.params)
        # what was proposed already is answered with nothing, so that the sampler goes elsewhere
        asked.tell(trial, state=package.trial.TrialState.FAIL)
        if point.fingerprint not in seen:
            seen.add(point.fingerprint)
            points.append(point)
            if len(points) == wanted:
                return points
    # the sampler is stuck on what is known: the rest at random, from what is left
    generator = random.Random(seed)
    for _ in range(2000):
        if len(points) == wanted:
            break
        point = study.point({name: generator.choice(values) for name, values in study.dimensions.items()})
        if point.fingerprint not in seen:
            seen.add(point.fingerprint)
            points.append(point)
    return points


# ---------------------------------------------------------------------------------------------------
# Workers


def run_one(queue: Queue, study: Study, out: Path, trial: Any) -> None:
    """Run a claimed trial and keep what becomes of it; whatever goes wrong with it is its outcome."""
    with queue.beating(trial):
        try:
            outcome = evaluate(study, study.from_dict(json.loads(trial.user_attrs["point"])), out)
        except MemoryError:
            outcome = Outcome("failed", "out of memory", {}, {}, {}, [])
        except Exception as error:  # one point's failure is its result, and no end of the study
            outcome = Outcome("failed", describe_error(error), {}, {}, {}, [])
    queue.finish(trial, outcome)


def work(job: Job, parent: int | None = None) -> int:
    """A worker's life: run what waits, until the study is said to be finished. How many trials it ran.

    Args:
        parent: the process that began it: without it, nobody is left to wait for.
    """
    quiet()
    study = job.study()
    queue = Queue(study, job.storage)
    count = 0
    while parent is None or os.getppid() == parent:
        trial = queue.claim()
        if trial is not None:
            run_one(queue, study, Path(job.out), trial)
            count += 1
        elif queue.trials_of.user_attrs.get("finished"):
            break
        else:
            time.sleep(_PAUSE)
    return count


def _child(job: Job, parent: int) -> None:
    import signal

    # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(KeyboardInterrupt):
        work(job, parent)


class _Here:
    """No worker but this process."""

    def __init__(self, queue: Queue, job: Job):
        self.queue, self.study, self.out = queue, queue.study, Path(job.out)

    def step(self) -> bool:
        """Run one trial; False if none waits."""
        trial = self.queue.claim()
        if trial is None:
            return False
        run_one(self.queue, self.study, self.out, trial)
        return True

    def stop(self) -> None:
        """Nothing to end."""


class _Processes:
    """Local processes; one that dies is replaced."""

    def __init__(self, job: Job, count: int):
        import multiprocessing

        # a fresh interpreter a worker: torch's threads do not survive a fork
        self.context = multiprocessing.get_context("spawn")
        self.job, self.left = job, count * ATTEMPTS
        self.workers = [self._begin() for _ in range(count)]

    def _begin(self) -> Any:
        quiet()
        worker = self.context.Process(target=_child, args=(self.job, os.getpid()), daemon=True)
        worker.start()
        return worker

    def step(self) -> bool:
        """Look after the workers; never does work itself."""
        for i, worker in enumerate(self.workers):
            if not worker.is_alive() and worker.exitcode:
                self.left -= 1
                if self.left < 0:
                    raise LNSError(
                        f"workers die again and again (exit status {worker.exitcode}); finished trials are kept. "
                        "Fewer --workers need less memory"
                    )
                self.workers[i] = self._begin()
        return False

    def stop(self) -> None:
        """End them: they finish by themselves when the study is, and are ended when it is interrupted."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join(10)


class _Ray:
    """Workers of a Ray cluster, or of one that is begun here."""

    def __init__(self, job: Job, count: int, address: str):
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("--ray needs Ray: pip install 'lnsdeploy[study,ray]'") from error
        self.ray = ray
        self.own = not ray.is_initialized()
        if self.own:
            here: dict[str, Any] = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
        remote = ray.remote(num_cpus=1, max_retries=-1)(work)
        self.tasks = [remote.remote(job) for _ in range(count)]

    def step(self) -> bool:
        """Raise what a worker died of."""
        done, self.tasks = self.ray.wait(self.tasks, num_returns=1, timeout=0) if self.tasks else ([], [])
        for task in done:
            self.ray.get(task)
        return False

    def stop(self) -> None:
        """End them."""
        for task in self.tasks:
            self.ray.cancel(task, force=True)
        if self.own:
            self.ray.shutdown()


def search(
    study: Study,
    job: Job,
    *,
    workers: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
) -> list[tuple[int, Point, Outcome, Any]]:
    """Run a study to its end, or on from where it was when its processes were killed.

    Args:
        workers: processes; with 1 it is this one.
        ray: an address of a Ray cluster, ``"auto"`` for the one that is there, ``"local"`` for one that is begun here.
        progress: called with points finished, points known so far, and the time left.
    Returns: place, point, outcome and trial of every point, in the study's order.

    Raises:
        LNSError: the storage cannot be opened, or workers die again and again.
    """
    if workers < 1:
        raise BadValueError(f"workers must be at least 1, not {workers}")
    queue = Queue(study, job.storage)
    queue.trials_of.set_user_attr("finished", False)
    engine: _Here | _Processes | _Ray | None = None
    clock = _Clock(study)
    number, place = 0, 0
    known: list[tuple[int, Point]] = []
    finished = False
    try:
        while True:
            earlier = [(p, point, outcome) for p, point, outcome, _ in queue.outcomes() if p < place]
            points = generation(study, number, earlier)
            if not points:
                break
            known += list(enumerate(points, place))
            place += len(points)
            number += 1
            while True:
                looked = time.monotonic()
                table = queue.table()
                done = _finished(table, known)
                if done == len(known):
                    break
                queue.put(known, AHEAD + AHEAD_EACH * workers, table)
                if engine is None:
                    # only where there is something to do: torch takes seconds to load
                    if ray is not None:
                        engine = _Ray(job, workers, ray)
                    else:
                        engine = _Here(queue, job) if workers == 1 else _Processes(job, workers)
                clock.tell(progress, done, len(known))
                if not engine.step():
                    queue.recover()
                    # looking takes time from those who work
                    time.sleep(max(_PAUSE, 10 * (time.monotonic() - looked)))
        finished = True
        clock.tell(progress, len(known), len(known))
        wanted = {point.fingerprint for _, point in known}
        return [entry for entry in queue.outcomes() if entry[1].fingerprint in wanted]
    finally:
        if finished:
            queue.trials_of.set_user_attr("finished", True)
        if engine is not None:
            engine.stop()


def _finished(table: Mapping[str, Sequence[Any]], known: Sequence[tuple[int, Point]]) -> int:
    return sum(any(trial.state.is_finished() for trial in table.get(point.fingerprint, ())) for _, point in known)


class _Clock:
    """How long it will take yet."""

    def __init__(self, study: Study):
        self.begun = time.monotonic()
        self.first: int | None = None
        self.trials = study.search.trials if study.search.method in ("tpe", "nsga2") else 0

    def tell(self, progress: Progress | None, done: int, total: int) -> None:
        """Say it."""
        if self.first is None:
            self.first = done
        if progress is None:
            return
        total = max(total, self.trials)
        made, passed = done - self.first, time.monotonic() - self.begun
        left = "" if made < 3 else f"{_duration(passed / made * (total - done))} left"
        progress(done, total, left)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
