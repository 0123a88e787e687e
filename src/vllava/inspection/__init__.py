"""What a run's data are like before it starts: figures over all of it, its first batches as the model sees them."""
