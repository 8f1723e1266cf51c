import backends.quiet  # noqa: F401  before anything imports transformers
