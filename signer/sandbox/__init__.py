"""The kernel's protections around the process that holds the keys."""
