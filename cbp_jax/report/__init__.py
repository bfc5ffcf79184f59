"""Results files, pictures and tables of runs. Requires ``pip install "cbp-jax[report]"``."""

from cbp_jax.report import records
from cbp_jax.report.benchmark_plots import plot_benchmark
from cbp_jax.report.benchmarks import benchmark_rows, benchmark_table
from cbp_jax.report.comparison_plots import plot_differences, plot_search
from cbp_jax.report.comparisons import Estimate, comparison_table, estimate, paired_differences
from cbp_jax.report.divergence import diverged_tasks, mark_diverged
from cbp_jax.report.drawing import save_figures
from cbp_jax.report.grids import plot_grid, sensitivity
from cbp_jax.report.joining import compare_results, join_results
from cbp_jax.report.measures import VALIDATION_MEASURES, stream_measures
from cbp_jax.report.network import plot_units
from cbp_jax.report.plots import best_variants, plot_run, plot_tasks, plot_updates
from cbp_jax.report.results import new_results, record_lanes, record_task
from cbp_jax.report.runs import list_runs, runs_table
from cbp_jax.report.sensitivity_plots import plot_sensitivity
from cbp_jax.report.statistics import blocks_of_tasks, finished_tasks, last_tenth, summary
from cbp_jax.report.storage import load_results, save_results
from cbp_jax.report.tickets import plot_accuracies, plot_densities, plot_tickets, summarize_tickets

__all__ = [
    "VALIDATION_MEASURES",
    "Estimate",
    "benchmark_rows",
    "benchmark_table",
    "best_variants",
    "blocks_of_tasks",
    "compare_results",
    "comparison_table",
    "diverged_tasks",
    "estimate",
    "finished_tasks",
    "join_results",
    "last_tenth",
    "list_runs",
    "load_results",
    "mark_diverged",
    "new_results",
    "paired_differences",
    "plot_accuracies",
    "plot_benchmark",
    "plot_densities",
    "plot_differences",
    "plot_grid",
    "plot_run",
    "plot_search",
    "plot_sensitivity",
    "plot_tasks",
    "plot_tickets",
    "plot_units",
    "plot_updates",
    "record_lanes",
    "record_task",
    "records",
    "runs_table",
    "save_figures",
    "save_results",
    "sensitivity",
    "stream_measures",
    "summarize_tickets",
    "summary",
]
