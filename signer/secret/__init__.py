"""Secrets in files, descriptors and memory."""
