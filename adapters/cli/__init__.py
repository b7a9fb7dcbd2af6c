"""The command line that every backend shares: options, progress, tables."""
