"""The `paro` command, one file per subcommand. Each has `add(commands)`, its arguments, and `run(args) -> int`."""
