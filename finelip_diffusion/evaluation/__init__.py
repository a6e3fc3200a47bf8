"""What pictures and text states are worth: features, judges, retrieval, comparisons and their reports."""
