"""Networks: views, cells, recurrences, and the classifier."""
