"""Open questions about the loss of plasticity, each an experiment."""
