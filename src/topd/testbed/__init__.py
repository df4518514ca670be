"""A world whose forks are known: three families of problems, tiny models, a label a token."""
