"""The plan of a run: what it will compile and keep in memory, and how long it will take."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from cbp_jax.report.records import duration
from cbp_jax.training.lanes import LaneMode

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_SHOWN = 6  # maximum number of labels to show for a program


class Program(NamedTuple):
    """Lanes that one compiled program runs.

    Attributes:
      methods: labels of the methods, each with all seeds.
      lanes: methods times seeds.
      lane_bytes: bytes of a lane's network and optimizer state; None if unknown in advance.
      shared_bytes: bytes of the data on every device.
      at_once: the most lanes on the devices at once; None for all.
      mode: how the lanes of a device run, see `training.Lanes`.
    """

    methods: tuple[str, ...]
    lanes: int
    lane_bytes: int | None = None
    shared_bytes: int = 0
    at_once: int | None = None
    mode: LaneMode = "auto"


class Timed(NamedTuple):
    """How long the lanes of one program take in this process, measured on its first tasks.

    Attributes:
      methods: labels of the methods.
      of_a_call: how many lanes run at once, and were timed.
      calls: how many times a task is run, until all lanes have done it.
      tasks: of each lane.
      first: seconds of the first task, with compilation.
      task: seconds of a later task; None if there is only one.
      memory: the most bytes in use on a device of this process until then; None where devices do not report it, such as
        CPUs.
    """

    methods: tuple[str, ...]
    of_a_call: int
    calls: int
    tasks: int
    first: float
    task: float | None
    memory: int | None = None

    @property
    def compilation(self) -> float:
        """Seconds of compilation; where there is only one task, they include it."""
        return self.first if self.task is None else max(self.first - self.task, 0.0)

    @property
    def seconds(self) -> float:
        """Estimated seconds of all tasks of all lanes, with compilation."""
        later = self.calls * self.tasks - (self.task is None)
        return self.compilation + later * (self.first if self.task is None else self.task)


class Plan(NamedTuple):
    """The parts of a run.

    Attributes:
      programs: what is compiled, in the order in which it runs.
      seeds: of each method.
      tasks: of each lane.
      processes: how many share the lanes.

    Example:
      >>> program = Program(("bp", "bp(step_size=0.1)"), 6, lane_bytes=2**20, at_once=4)
      >>> print(Plan((program,), seeds=3, tasks=10).text(["cpu:0", "cpu:1"]))
      plan: 1 program to compile, 6 lanes (2 methods x 3 seeds) of 10 tasks, on 2 devices
        bp, bp(step_size=0.1): 6 lanes in 2 batches; at least 2 MiB on each device
    """

    programs: tuple[Program, ...]
    seeds: int
    tasks: int
    processes: int = 1

    def text(self, devices: Sequence[object] | None = None) -> str:
        """Return the plan in lines.

        Args:
          devices: devices for the lanes, by default all of this process.
        """
        devices = jax.local_devices() if devices is None else devices
        methods, lanes = sum(len(program.methods) for program in self.programs), sum(p.lanes for p in self.programs)
        kind = f" ({devices[0].device_kind})" if hasattr(devices[0], "device_kind") else ""
        head = (
            f"plan: {_count(len(self.programs), 'program')} to compile, {_count(lanes, 'lane')} "
            f"({_count(methods, 'method')} x {_count(self.seeds, 'seed')}) of {_count(self.tasks, 'task')}, "
            f"on {_count(len(devices), 'device')}{kind}"
        )
        if self.processes > 1:
            head += f" of each of {_count(self.processes, 'process', 'processes')}"
        return "\n".join([head, *(f"  {_line(program, len(devices), self.processes)}" for program in self.programs)])


def time_text(timed: Sequence[Timed]) -> str:
    """Return how long a run takes, in lines.

    Args:
      timed: of its programs.

    Example:
      >>> cbp = Timed(("cbp",), of_a_call=2, calls=15, tasks=800, first=21.0, task=4.5)
      >>> print(time_text([cbp, cbp._replace(methods=("bp",), tasks=1, task=None)]))
      time: about 15 h 5 min, of which compilation 38 s, if all tasks take as long as the first ones, timed here
        cbp: 16 s to compile, then 4.5 s for a task of 2 lanes; 15 calls x 800 tasks
        bp: 21 s to compile and for a task of 2 lanes, so at most; 15 calls x 1 task
      >>> print(time_text([cbp._replace(memory=3 * 2**30)]).splitlines()[1])
        cbp: 16 s to compile, then 4.5 s for a task of 2 lanes; 15 calls x 800 tasks; up to 3 GiB on a device
    """
    found = [
        f"time: about {duration(sum(each.seconds for each in timed))}, of which compilation "
        f"{duration(sum(each.compilation for each in timed))}, if all tasks take as long as the first ones, timed here"
    ]
    for each in timed:
        lanes = f"for a task of {_count(each.of_a_call, 'lane')}"
        cost = f"{duration(each.compilation)} to compile, then {duration(each.task or 0)} {lanes}"
        if each.task is None:
            cost = f"{duration(each.first)} to compile and {lanes}, so at most"
        calls = f"{_count(each.calls, 'call')} x {_count(each.tasks, 'task')}"
        memory = "" if each.memory is None else f"; up to {_size(each.memory)} on a device"
        found.append(f"  {_shown(each.methods)}: {cost}; {calls}{memory}")
    return "\n".join(found)


def _line(program: Program, devices: int, processes: int) -> str:
    shown = _shown(program.methods)
    of_process = math.ceil(program.lanes / processes)
    at_once = min(program.at_once or of_process, of_process)
    batches = f" in {_count(math.ceil(of_process / at_once), 'batch', 'batches')}" if at_once < of_process else ""
    if program.lane_bytes is None:
        return f"{shown}: {_count(program.lanes, 'lane')}{batches}"
    needed = math.ceil(at_once / devices) * program.lane_bytes + program.shared_bytes
    return f"{shown}: {_count(program.lanes, 'lane')}{batches}; at least {_size(needed)} on each device"


def _shown(methods: Sequence[str]) -> str:
    return ", ".join([*methods[:_SHOWN], *(["..."] if len(methods) > _SHOWN else [])])


def _count(number: int, name: str, several: str | None = None) -> str:
    return f"{number:,} {name if number == 1 else several or name + 's'}"


def _size(number: float) -> str:
    power = min(int(math.log(max(number, 1), 1024)), len(_UNITS) - 1)
    return f"{number / 1024**power:.3g} {_UNITS[power]}"
