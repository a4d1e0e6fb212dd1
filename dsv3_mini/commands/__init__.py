"""The subcommands of `dsv3`, a file each: they read flags, call the package, and print."""
