"""The folder of a run: locking, and resuming an earlier run.

One process keeps the results and the state of its lanes in two files. Several processes share nothing but the folder:
each writes its results into a folder of its own below `processes/`, and the states of its lanes into files there that
are named after the lanes. Whoever resumes the run, with any number of processes, reads all of them. The process that
finishes last joins the results and removes the rest.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax import files, training
from cbp_jax.experiments.share import Share
from cbp_jax.training import Lane

STATE_FILE = "state.msgpack"
_STATES = "state-*.msgpack"  # of some lanes
_DIGEST = hashlib.sha256().digest_size


class Kept:
    """The results of a run and their place on disk.

    Args:
      results: what is measured is written into them.
      out: folder of the run.
      share: this process, where several share the run.
      lanes: of this process, where several share the run.
    """

    def __init__(self, results: Any, out: Path, share: Share | None = None, lanes: Sequence[Lane] = ()):
        from cbp_jax import report

        self.results, self.out, self.share, self._lanes = results, Path(out), share, tuple(lanes)
        if share is not None:
            own = _part(self.out, share) / report.storage.FILE_NAME
            before = report.records.seconds_of(report.load_results(own)) if own.exists() else {}
            self._others_seconds = {
                method: seconds - before.get(method, 0.0)
                for method, seconds in report.records.seconds_of(results).items()
            }

    def positions(self, lanes: Sequence[Lane]) -> tuple[np.ndarray, np.ndarray]:
        """Return where lanes are in the results; see `report.results.positions_of`."""
        from cbp_jax import report

        return report.results.positions_of(self.results, lanes)

    def save(self) -> None:
        """Write the results, of several processes those of this one's lanes."""
        from cbp_jax import report

        if self.share is None:
            report.save_results(self.results, self.out)
            return
        rows, columns = self.positions(self._lanes)
        others = np.ones((self.results.sizes["method"], self.results.sizes["seed"]), bool)
        others[rows, columns] = False
        part = self.results.copy(deep=True)
        for values in [*part.data_vars.values(), *([part.diverged] if "diverged" in part.coords else [])]:
            values.values[others] = np.nan
        part.attrs.pop("seconds", None)
        for method, seconds in report.records.seconds_of(self.results).items():
            report.records.add_seconds(part, [method], seconds - self._others_seconds.get(method, 0.0))
        report.save_results(part, _part(self.out, self.share))

    def clean(self) -> None:
        """Write the results in one file, and remove those of the processes that had parts in them."""
        from cbp_jax import report

        if self.share is None:
            self.save()
            for file in report.storage.part_files(self.out):
                file.unlink()

    def states(self, name: str, lanes: Sequence[Lane]) -> list[training.Saved]:
        """Return the saved states of lanes of one program, whichever process wrote them.

        Args:
          name: of the program, see `training.Checkpoint`.
          lanes: all of the program, in their order.

        Raises:
          ValueError: a state is damaged.
        """
        found = []
        for path in [self.out / STATE_FILE, *sorted(_processes(self.out).glob(_STATES))]:
            saved = training.read_state(path)
            if saved is None or saved.name != name:
                continue
            if saved.lanes is None:  # an earlier version wrote it
                labels = list(dict.fromkeys(label for label, _ in lanes))
                if saved.needs != digest(self.results, labels, saved.tasks):
                    raise _not_those(saved)
                saved = saved._replace(lanes=tuple(lanes), needs=self.digests(lanes, saved.tasks))
            found.append(saved)
        return found

    def checked(self, saved: training.Saved, lane: Lane) -> training.Saved:
        """Return the state; raise a ValueError if the results are not those that a lane of it needs."""
        place = _DIGEST * saved.lanes.index(lane)
        if saved.needs[place : place + _DIGEST] != self.digests([lane], saved.tasks):
            raise _not_those(saved)
        return saved

    def digests(self, lanes: Sequence[Lane], tasks: int) -> bytes:
        """Return checksums, one after the other, of what was measured of the first tasks in lanes."""
        found = [hashlib.sha256() for _ in lanes]
        rows, columns = self.positions(lanes)
        for name, values in self.results.data_vars.items():
            kept = values.values[rows, columns, :tasks]
            kept = np.where(np.isnan(kept), np.nan, kept).astype(kept.dtype)
            for of_lane, row in zip(found, kept, strict=True):
                of_lane.update(name.encode() + row.tobytes())
        return b"".join(of_lane.digest() for of_lane in found)

    def state_path(self, name: str, lanes: Sequence[Lane], every: Sequence[Lane]) -> Path:
        """Return the file for the state of lanes of a program, of which `every` are all."""
        # A file is simply removed in the end where no other can have an older state of these lanes.
        if self.share is None and tuple(lanes) == tuple(every) and not any(_processes(self.out).glob(_STATES)):
            return self.out / STATE_FILE
        number = hashlib.sha256(json.dumps([name, list(lanes)]).encode()).hexdigest()[:16]
        path = _processes(self.out) / _STATES.replace("*", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self, checkpoint: training.Checkpoint) -> None:
        """End with a state: its lanes are done. Their last results are written first."""
        self.save()
        if checkpoint.path.parent == self.out:
            checkpoint.delete()
        else:  # other files may have older states of them
            checkpoint.close(self.results.sizes["task"])


@contextlib.contextmanager
def kept(results: Any, out: Path, share: Share | None = None, lanes: Sequence[Lane] = ()) -> Iterator[Kept]:
    """Lock a folder for a run until its end, and load the results of an earlier run.

    Args:
      results: empty results of the run; see `report.new_results`.
      out: the folder; created if needed.
      share: this process, if several share the run and it has claimed the folder by `claimed`.
      lanes: those of this process, if several share the run.

    Yields:
      the results in the folder if they belong to this run, otherwise `results`, together with what writes them.

    Raises:
      BlockingIOError: another run is using the folder.
      ValueError: the folder has results that cannot be read, or results of a different run. They are not changed.
    """
    with files.locked(out) if share is None else contextlib.nullcontext():
        found = _found(out)
        if found is None:
            if share is None:
                _remove_states(out)  # useless without the earlier results
            yield Kept(results, out, share, lanes)
            return
        _refuse_other(found, out, results.attrs["experiment"], results.attrs["settings"])
        if differing := _differing_shapes(found, results):
            raise ValueError(
                f"{out} holds {_finished(found)} of a run by another version of cbp_jax: {'; '.join(differing)}. "
                + _ways_out(out)
            )
        yield Kept(found, out, share, lanes)


@contextlib.contextmanager
def opened(results: Any, out: Path) -> Iterator[Any]:
    """Lock a folder like `kept`, for one process, and yield the results."""
    with kept(results, out) as found:
        yield found.results


@contextlib.contextmanager
def claimed(out: Path, share: Share) -> Iterator[None]:
    """Lock the folder of a run for one of several processes.

    Args:
      out: the folder; created if needed.
      share: the process.

    Raises:
      BlockingIOError: the folder is in use by a single-process run, by a process with the same id, or by a run with
        another number of processes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.locked(out, shared=True))
        stack.callback(_remove_empty, out)
        for lock in _processes(out).glob(f"*/{files.LOCK_FILE}"):
            if lock.parent.name.partition("-of-")[2] != str(share.count):
                try:
                    with files.locked(lock.parent):
                        pass
                except BlockingIOError as error:
                    raise BlockingIOError(
                        error.errno,
                        f"process {lock.parent.name} is at work in {out}, and processes is {share.count} now",
                    ) from None
        try:
            stack.enter_context(files.locked(_part(out, share)))
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                f"process {share.index} of {share.count} is at work in {out} already: each needs its own process_id",
            ) from None
        yield


def join(out: Path) -> tuple[Any, bool]:
    """Join the results of the processes of a run, if all lanes are finished and no process is running.

    Args:
      out: folder of the run.

    Returns:
      the results, and whether they were joined.
    """
    from cbp_jax import report

    results = report.load_results(out)
    if not results.replaced_units.notnull().all():
        return results, False
    try:
        with files.locked(out):
            results = report.load_results(out)
            results.attrs.pop("failed", None)  # of a process that has been replaced
            report.save_results(results, out)
            remove_parts(out)
    except BlockingIOError:  # a running process will do it
        return results, False
    return results, True


def remove_parts(out: Path) -> None:
    """Remove the files of single processes from a run whose results have been joined."""
    from cbp_jax import report

    _remove_states(out)
    for file in report.storage.part_files(out):
        file.unlink(missing_ok=True)
    for folder in [*_processes(out).glob("*-of-*"), _processes(out)]:
        for path in (folder / files.LOCK_FILE, files.partial(folder / report.storage.FILE_NAME)):
            path.unlink(missing_ok=True)
    _remove_empty(out)


def _remove_empty(out: Path) -> None:
    for folder in [*_processes(out).glob("*-of-*"), _processes(out)]:
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()


def _remove_states(out: Path) -> None:
    for path in [out / STATE_FILE, *_processes(out).glob(_STATES)]:
        path.unlink(missing_ok=True)
        files.partial(path).unlink(missing_ok=True)


def _processes(out: Path) -> Path:
    from cbp_jax import report

    return out / report.storage.PARTS


def _part(out: Path, share: Share) -> Path:
    return _processes(out) / f"{share.index}-of-{share.count}"


def _not_those(saved: training.Saved) -> ValueError:
    return training.unusable(saved.path, f"the results next to it are not those of its {saved.tasks} tasks")


def check(out: Path, experiment: str, settings: Any, share: Share | None = None) -> None:
    """Raise if a folder holds anything but an earlier run of the same settings, or is in use.

    Args:
      out: the folder.
      experiment: name of the experiment.
      settings: its settings, a dataclass.
      share: this process, where several share the run, and may be at work.

    Raises:
      BlockingIOError: another run is using the folder.
      NotADirectoryError: it is a file.
      ValueError: it holds other things.
    """
    from cbp_jax import report

    name = report.storage.FILE_NAME
    left_by_a_kill = {files.LOCK_FILE, files.partial(out / name).name, report.storage.PARTS}
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= left_by_a_kill):
        return
    with files.locked(out, shared=share is not None):
        found = _found(out)
    if found is None:
        raise ValueError(f"{out} is not empty and holds no run: it has no {name}; choose another folder by --out")
    _refuse_other(found, out, experiment, report.results.settings_json(settings))


def digest(results: Any, methods: Sequence[str], tasks: int) -> bytes:
    """Return a checksum of the results of some methods on the first tasks."""
    found = hashlib.sha256()
    for name, values in results.data_vars.items():
        kept = values.loc[{"method": list(methods)}].isel(task=slice(tasks)).values
        found.update(name.encode() + np.where(np.isnan(kept), np.nan, kept).astype(kept.dtype).tobytes())
    return found.digest()


def _found(out: Path) -> Any:
    from cbp_jax import report

    try:
        return report.load_results(out)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}. It is left as it is. {_ways_out(out)}") from error


def _refuse_other(found: Any, out: Path, experiment: str, settings: str) -> None:
    if found.attrs["experiment"] != experiment:
        raise ValueError(f"{out} holds another experiment, {found.attrs['experiment']!r}. {_ways_out(out)}")
    try:
        old, new = json.loads(found.attrs["settings"]), json.loads(settings)
        keys = sorted(old.keys() | new.keys())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{out} holds a file that is not a results file of cbp_jax: its settings cannot be read. {_ways_out(out)}"
        ) from error
    shown = lambda of, key: json.dumps(of[key]) if key in of else "unknown"
    both = {key: (shown(old, key), shown(new, key)) for key in keys}
    differing = [f"{key} is {there} there and {now} now" for key, (there, now) in both.items() if there != now]
    if differing:
        raise ValueError(
            f"{out} holds {_finished(found)} of a run with other settings ({'; '.join(differing)}). {_ways_out(out)}"
        )


def _differing_shapes(found: Any, results: Any) -> list[str]:
    """Return differences between runs of the same settings by two versions of the library."""
    differing = []
    old, new = list(found.data_vars), list(results.data_vars)
    if set(old) != set(new):
        only = lambda names, others: ", ".join(name for name in names if name not in others) or "none"
        differing.append(f"measures only there: {only(old, new)}, only now: {only(new, old)}")
    for dim in dict.fromkeys((*found.dims, *results.dims)):
        if dim not in found.indexes or dim not in results.indexes:
            differing.append(f"{dim} is only {'there' if dim in found.dims else 'now'}")
        elif not found.indexes[dim].equals(results.indexes[dim]):
            differing.append(f"each {dim} is named otherwise, or there are {found.sizes[dim]} and {results.sizes[dim]}")
    return differing


def _finished(results: Any) -> str:
    others = lambda values: [dim for dim in values.dims if dim not in ("method", "task")]
    counts = [int(values.notnull().any(others(values)).sum()) for values in results.data_vars.values()]
    return f"{max(counts, default=0)} finished tasks"


def _ways_out(out: Path) -> str:
    from cbp_jax import report

    kept = [out / name for name in (report.storage.FILE_NAME, STATE_FILE, report.storage.PARTS)]
    kept = [path for path in kept if path.exists()]
    return f"Choose another folder (--out), or move {' and '.join(map(str, kept))} away to start again here"
