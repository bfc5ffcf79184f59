"""Measures of a task: their names and meanings."""

#: Measures of each task, for each method and seed: name of the data variable, and its meaning.
MEASURES: dict[str, str] = {
    "accuracy": "fraction of the task's examples classified correctly, each before learning from it",
    "loss": "mean loss of the task's examples, each before learning from it",
    "dead_units": "fraction of hidden units that are zero on every measured example, before the task",
    "weight_magnitude": "mean absolute weight, before the task",
    "effective_rank": "effective rank over the number of units, mean over hidden layers, before the task",
    "stable_rank": "stable rank over the number of units, mean over hidden layers, before the task",
    "replaced_units": "units replaced during the task",
}
#: Additional measures if updates are measured; see :func:`stream_measures`.
UPDATE_MEASURES: dict[str, str] = {
    "plasticity": "1 - loss after / loss before the update, clipped to [0, 1], mean over examples",
    "gradient_l0": "fraction of gradients that are not 0, mean over measured updates",
    "gradient_l1": "L1 norm of the gradient, mean over measured updates",
    "gradient_l2": "L2 norm of the gradient, mean over measured updates",
    "weight_rank": "sum of the kernels' ranks over the largest possible, before the task",
    "weight_effective_rank": "sum of the kernels' effective ranks over the largest possible, before the task",
    "weight_sparsity": "fraction of weights of at most a hundredth of their kernel's root mean square, before the task",
    "weight_l1": "L1 norm of the weights, before the task",
    "weight_l2": "L2 norm of the weights, before the task",
}
#: Additional measures if tasks have test examples.
TEST_MEASURES: dict[str, str] = {
    "test_accuracy": "fraction of the task's test examples classified correctly, after the task",
    "test_loss": "mean loss of the task's test examples, after the task",
}
#: Additional measures if weights are chosen by validation examples.
VALIDATION_MEASURES: dict[str, str] = {
    "validation_accuracy": "fraction of the task's validation examples classified correctly, after the task",
}
#: Additional measures if a threshold for dormant units is given.
DORMANT_MEASURES: dict[str, str] = {
    "dormant_units": "fraction of hidden units of small activation, relative to their layer's, before the task",
}


def stream_measures(
    *, accuracy: bool = True, updates: bool = False, test: bool = False, dormant: bool = False
) -> dict[str, str]:
    """Return the measures of a stream of tasks.

    Args:
      accuracy: whether tasks are classifications.
      updates: whether plasticity and gradients are measured, and the weights as matrices.
      test: whether tasks have test examples.
      dormant: whether dormant units are counted.

    Returns:
      name of each measure, and its meaning.

    Example:
      >>> [name for name in stream_measures(accuracy=False) if "accuracy" in name]
      []
    """
    measures = MEASURES | (TEST_MEASURES if test else {}) | (DORMANT_MEASURES if dormant else {})
    measures |= UPDATE_MEASURES if updates else {}
    return {name: meaning for name, meaning in measures.items() if accuracy or "accuracy" not in name}
