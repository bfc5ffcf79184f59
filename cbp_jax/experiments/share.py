"""Which lanes a process runs, where several processes run one experiment."""

from typing import NamedTuple


class Share(NamedTuple):
    """One of several processes that share the lanes of a run.

    Lanes are dealt like cards, over all programs: process 0 has the first lane, process 1 the second, and so on.

    Attributes:
      index: of the process, from 0.
      count: of processes.

    Example:
      >>> Share(1, 3).lanes(5), Share(1, 3).lanes(4, first=5)
      ([1, 4], [2])
    """

    index: int
    count: int

    def lanes(self, number: int, first: int = 0) -> list[int]:
        """Return the lanes of this process among `number` lanes, of which `first` were dealt before."""
        return [lane for lane in range(number) if (first + lane) % self.count == self.index]

    def check(self, lanes: int) -> None:
        """Raise a ValueError if there is no such process, or if some of them would have no lane."""
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(
                f"process_id must be from 0 to {self.count - 1}, one less than processes, got {self.index}"
                if self.count > 0
                else f"processes must be at least 1, got {self.count}"
            )
        if self.count > lanes:
            raise ValueError(
                f"processes must be at most the {lanes} lanes (methods times seeds) of this run, got {self.count}"
            )
