"""Training: engine, handlers, metrics of an epoch, datasets and batches."""
