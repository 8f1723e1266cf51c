"""How good the images of solvers, tables and models are: the claims on quality in docs/results.md."""
