"""The training loop: seeds and hyperparameters as lanes, tasks as compiled scans."""

from cbp_jax.training.checkpoint import Checkpoint
from cbp_jax.training.head import output_layers, zero_layers
from cbp_jax.training.lanes import Lanes
from cbp_jax.training.loop import Learner, TrainState, init_state, measure, run_task, run_tasks

__all__ = [
    "Checkpoint",
    "Lanes",
    "Learner",
    "TrainState",
    "init_state",
    "measure",
    "output_layers",
    "run_task",
    "run_tasks",
    "zero_layers",
]
