"""Lightning modules, callbacks and the optimiser."""
