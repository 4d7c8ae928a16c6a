"""An HTML page about training runs, made of their folders alone and without torch: `python -m gandist.report`."""
