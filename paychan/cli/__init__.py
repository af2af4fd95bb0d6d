"""The `paychan` command: one module per group of subcommands."""
