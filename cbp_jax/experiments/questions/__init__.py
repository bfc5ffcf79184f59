"""Open questions about the loss of plasticity, each an experiment in which all that is compared is searched alike."""
