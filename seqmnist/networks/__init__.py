"""What reads: views, cells, recurrences, and the network they make up."""
