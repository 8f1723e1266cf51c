"""Stage 2: residual Dirichlet policy optimisation (RDPO) of a solver table on a reward."""
