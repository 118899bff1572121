"""What trains: steps, optimizers, batches, the loop, members and devices."""
