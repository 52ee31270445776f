"""The cache scripts: one module per executable in cache/, whose docstring is the help text of both."""
