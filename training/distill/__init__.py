"""Stage 1: learn a solver's numbers from a fine teacher's trajectories."""
