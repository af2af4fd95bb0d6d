"""Modules that server and signer both run. They import the standard library and each other, nothing else."""
