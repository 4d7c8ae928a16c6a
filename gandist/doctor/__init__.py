"""What to know of a new cluster before the first job: `python -m gandist.doctor`."""
