"""A progress bar for experiments."""

import sys


class Bar:
    """Shows how many tasks of all lanes are done, the time left, and what the last task measured.

    Args:
      total: tasks times lanes.
      quiet: show nothing.
      percent: show percentages instead of tasks, if tasks of several problems are weighted.
    """

    def __init__(self, total: int, quiet: bool = False, percent: bool = False):
        from tqdm import tqdm  # needs the cli extra

        form = {"bar_format": "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"} if percent else {}
        how = {"file": sys.stderr, "disable": quiet, "mininterval": 1.0, "smoothing": 0.05}
        self._bar = tqdm(total=total, unit="task", **how, **form)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, methods: str, lanes: int, measures: dict[str, float]) -> None:
        """Count a finished task of each of `lanes` lanes. Tasks that were already done have no measurements."""
        shown = methods if len(methods) <= 30 else methods[:27] + "..."
        self._bar.set_description_str(shown, refresh=False)
        if "accuracy" in measures:
            self._bar.set_postfix_str(f"accuracy {100 * measures['accuracy']:.1f}%", refresh=False)
        elif "loss" in measures:
            self._bar.set_postfix_str(f"loss {measures['loss']:.4g}", refresh=False)
        self._bar.update(lanes)

    def diverged(self, method: str, seed: int, task: int) -> None:
        """Report a lane whose loss is no longer finite, above the bar. `task` counts from 0."""
        from cbp_jax.experiments.progress import diverged_text

        self.note(diverged_text(method, seed, task))

    def note(self, text: str) -> None:
        """Print a warning above the bar."""
        self._bar.write(f"warning: {text}", file=sys.stderr)
