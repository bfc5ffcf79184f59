"""Tiny text tasks in files, in which a few words distinguish the classes, so that small encoders learn quickly."""

import json
import random

FILLERS = ("the", "of", "and", "to", "in")
TASKS = {
    "animals": (("cat", "dog"), ("oak", "elm")),
    "letters": (("cat", "oak"), ("dog", "elm")),
    "three": (("cat", "elm"), ("dog", "oak"), ("fish", "ant")),
}


def write_tasks(folder, names=tuple(TASKS), texts=140, train=100):
    """Write files of tasks and return their paths. The classes of the words differ by task, so tasks interfere."""
    draw, paths = random.Random(0), []
    for name in names:
        rows = []
        for number in range(texts):
            label = draw.randrange(len(TASKS[name]))
            words = [draw.choice(TASKS[name][label] if draw.random() < 0.4 else FILLERS) for _ in range(8)]
            rows.append({"text": " ".join(words), "label": label, "split": "train" if number < train else "test"})
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        paths.append(str(path))
    return tuple(paths)
