"""The command line: one module per subcommand, and `cli`, which all of them use."""
