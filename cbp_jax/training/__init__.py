"""The training loop: seeds and hyperparameters as lanes, tasks as compiled scans."""

from cbp_jax.training.checkpoint import Checkpoint, Lane, Saved, read_state, unusable
from cbp_jax.training.head import output_layers, reset_layers, restart
from cbp_jax.training.increments import increment_programs, run_increment, run_increments, step_size_factor
from cbp_jax.training.injection import last_layers, with_injection
from cbp_jax.training.lanes import Lanes, one_blas_thread
from cbp_jax.training.learner import Learner, TrainState, init_state
from cbp_jax.training.loop import measure, run_lanes, run_task, run_tasks
from cbp_jax.training.step import train_step
from cbp_jax.training.symptoms import symptoms

__all__ = [
    "Checkpoint",
    "Lane",
    "Lanes",
    "Learner",
    "Saved",
    "TrainState",
    "increment_programs",
    "init_state",
    "last_layers",
    "measure",
    "one_blas_thread",
    "output_layers",
    "read_state",
    "reset_layers",
    "restart",
    "run_increment",
    "run_increments",
    "run_lanes",
    "run_task",
    "run_tasks",
    "step_size_factor",
    "symptoms",
    "train_step",
    "unusable",
    "with_injection",
]
