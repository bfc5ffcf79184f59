"""The plan of a run: what it will compile and keep in memory."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

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
    """

    methods: tuple[str, ...]
    lanes: int
    lane_bytes: int | None = None
    shared_bytes: int = 0
    at_once: int | None = None


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


def _line(program: Program, devices: int, processes: int) -> str:
    shown = [*program.methods[:_SHOWN], *(["..."] if len(program.methods) > _SHOWN else [])]
    of_process = math.ceil(program.lanes / processes)
    at_once = min(program.at_once or of_process, of_process)
    batches = f" in {_count(math.ceil(of_process / at_once), 'batch', 'batches')}" if at_once < of_process else ""
    if program.lane_bytes is None:
        return f"{', '.join(shown)}: {_count(program.lanes, 'lane')}{batches}"
    needed = math.ceil(at_once / devices) * program.lane_bytes + program.shared_bytes
    return f"{', '.join(shown)}: {_count(program.lanes, 'lane')}{batches}; at least {_size(needed)} on each device"


def _count(number: int, name: str, several: str | None = None) -> str:
    return f"{number:,} {name if number == 1 else several or name + 's'}"


def _size(number: float) -> str:
    power = min(int(math.log(max(number, 1), 1024)), len(_UNITS) - 1)
    return f"{number / 1024**power:.3g} {_UNITS[power]}"
