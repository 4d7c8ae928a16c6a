"""What a run is worth: extractors, distances, classification, and the evaluator that shares the work over the ranks."""
