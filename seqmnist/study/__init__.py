"""After training: a trained network, what it does, and how it leaves this package."""
