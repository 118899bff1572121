"""seqmnist: recurrent networks that read images as sequences, in JAX and Flax."""

__version__ = "0.1.0"
