"""Methods that learn a sequence of tasks with adapters, by name."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from cbp_jax import by_path

_NAMED = re.compile(r"(\w+)(?::(?P<plain>.*)|\((?P<call>.*)\))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class AdapterMethod:
    """A method that learns a sequence of tasks.

    Attributes:
      adapters: "one" adapter for all tasks; a "new" one for each task, used only for that task; a new one "added" to
        the earlier ones, all of which are used for every task; or "none", where all weights are trained.
      head: an "own" head for each task, over the task's classes; or a "shared" head over all classes so far, which is
        not given the task.
      l1: weight in the loss of the L1 norm of the adapter's change.
      orthogonality: weight in the loss of `lora.orthogonality` with the earlier adapters.
      form: form of that penalty, "absolute" or "squared".
      replay: fraction of each batch that comes from earlier tasks.
      joint: whether batches mix all tasks, from the first task on.
    """

    adapters: Literal["one", "new", "added", "none"] = "one"
    head: Literal["own", "shared"] = "own"
    l1: float = 0.0
    orthogonality: float = 0.0
    form: Literal["absolute", "squared"] = "absolute"
    replay: float = 0.0
    joint: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("adapters", ("one", "new", "added", "none")),
            ("head", ("own", "shared")),
            ("form", ("absolute", "squared")),
            ("joint", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("l1", "orthogonality", "replay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if self.replay >= 1:
            raise ValueError(f"replay must be below 1, got {self.replay}")
        if self.orthogonality and self.adapters not in ("new", "added"):
            raise ValueError(f"orthogonality needs an adapter for each task, got adapters={self.adapters!r}")
        if self.l1 and self.adapters == "none":
            raise ValueError("l1 penalizes the change by an adapter, got adapters='none'")


# Each row is a method. Its settings may be changed when it is named.
METHODS: dict[str, AdapterMethod] = {
    "sequential": AdapterMethod("one"),
    "per_task": AdapterMethod("new"),
    "per_task_l1": AdapterMethod("new", l1=1e-5),
    "added": AdapterMethod("added"),
    "added_l1": AdapterMethod("added", l1=1e-5),
    "o_lora": AdapterMethod("added", orthogonality=0.5),
    "full": AdapterMethod("none"),
    "replay": AdapterMethod("one", replay=0.5),
    "joint": AdapterMethod("one", joint=True),
}


def read_methods(texts: Sequence[str]) -> dict[str, AdapterMethod]:
    """Parse methods: names in `METHODS`, optionally with settings, as in "o_lora:head=shared,form=squared".

    Args:
      texts: the methods.

    Returns:
      them by label.

    Raises:
      ValueError: there are none, two are the same, or one or a setting of one is unknown or out of range.

    Example:
      >>> list(read_methods(["per_task", "o_lora:form=squared"]))
      ['per_task', 'o_lora(form=squared)']
    """
    found: dict[str, AdapterMethod] = {}
    for text in texts:
        match = _NAMED.fullmatch(text.strip())
        if match is None or match[1] not in METHODS:
            raise ValueError(f"methods must be of {list(METHODS)}, with settings if wanted, got {text!r}")
        settings = by_path.read_settings(match["plain"] or match["call"] or "")
        label = _label(match[1], settings)
        try:
            method = dataclasses.replace(METHODS[match[1]], **settings)
        except TypeError as error:
            known = [field.name for field in dataclasses.fields(AdapterMethod)]
            raise ValueError(f"method {text!r} has the settings {known}: {error}") from error
        except ValueError as error:
            raise ValueError(f"method {text!r}: {error}") from error
        if label in found:
            raise ValueError(f"methods must all be different, got {label!r} twice")
        found[label] = method
    if not found:
        raise ValueError("methods must be one or more, got none")
    return found


def _label(name: str, settings: dict[str, Any]) -> str:
    shown = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
    return f"{name}({shown})" if shown else name
