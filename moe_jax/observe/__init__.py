"""Looking at a run: metrics, progress, plots and profiler traces."""
