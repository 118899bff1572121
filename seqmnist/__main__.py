"""`python -m seqmnist` is `python -m seqmnist.main`."""

from seqmnist.main import main

main()
